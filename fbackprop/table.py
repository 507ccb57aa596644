"""The table of backward rules: one row per primitive, and how a row is written.

A row gives, for each operand of the primitive, its *pullback*: the function that turns the
cotangent of the result into the cotangent of that operand. What a pullback keeps from the forward
pass it says by the names of its parameters:

    ``ct``               the cotangent of the result (a tuple ``cts`` for several results)
    ``x``, ``y``, ``z``  the first, second, third operand
    ``xs``               all operands, as a tuple
    ``out``, ``outs``    the result, the results
    ``eqn``              static facts: ``eqn.params``, ``eqn.in_avals``, ``eqn.out_avals``
    ``arriving``         like ``cts``, with None for a cotangent that is known to be zero
    ``rules``            the rules in force, for a pullback that sweeps a function of its own

so that ``row("mul", lambda ct, y: ct * y, lambda ct, x: ct * x)`` is the whole rule of the
product, and the engine knows, without running it, that the cotangent of ``x`` needs ``y`` alone.
Scalars and axes of size one broadcast: the engine sums their cotangents, no rule has to.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax import lax

from fbackprop.program import (
    UNKNOWN_LINE,
    Equation,
    Primitive,
    cotangent_aval,
    find_primitive,
    has_forward_rule,
    has_transpose,
    is_inexact,
    laid_as,
    scalar,
    type_of,
    zeros,
)

_Function = TypeVar("_Function", bound=Callable)

OPERANDS = "xyz"
STATIC = frozenset({"ct", "cts", "arriving", "eqn", "rules"})  # what is not kept
NAMES = STATIC | {"out", "outs", "xs", *OPERANDS}


class MissingRule(NotImplementedError):
    """A primitive has no backward rule: none in the table when strict, or none that can be had.

    Attributes:
      primitive: its name.
      source: the line of the user's code that called it.
    """

    def __init__(self, primitive: Primitive, source: str, remedy: str):
        self.primitive, self.source, self.remedy = str(primitive), source, remedy
        super().__init__(
            f"no backward rule for primitive '{primitive}', called at {source}: write one with "
            f'@fb.defrule("{primitive}"){remedy}'
        )

    def __reduce__(self):  # pickled by what it was made of
        return MissingRule, (self.primitive, self.source, self.remedy)

    def seen_from(self, eqn: Equation) -> MissingRule:
        """The same error at the line of an enclosing call, where the inner one is not known.

        Library functions are traced once for all their callers, without any caller's line.
        """
        if self.source != UNKNOWN_LINE:
            return self
        return MissingRule(self.primitive, eqn.source, self.remedy)


class Rule:
    """How one primitive goes forward and backward. Control flow subclasses it directly.

    In every method `active` says which operands depend on the differentiated inputs, and `rules`
    is the `Rules` in force, for rules that sweep programs of their own.

    Attributes:
      reversible: whether there is a way back; False for loops of unknown length.
    """

    reversible = True

    def active_outputs(self, rules: Rules, eqn: Equation, active: tuple[bool, ...]):
        """Which results carry a derivative; by default all that are floating or complex."""
        return tuple(any(active) and is_inexact(aval) for aval in eqn.out_avals)

    def forward(self, rules: Rules, eqn: Equation, active: tuple[bool, ...], values: Sequence):
        """Run the equation; returns its results and a pytree of arrays kept for `pullback`."""
        raise NotImplementedError

    def pullback(self, rules: Rules, eqn: Equation, active: tuple[bool, ...], kept, cts: Sequence):
        """Cotangents of the operands from those of the results; None stands for zero."""
        raise NotImplementedError


class ZeroRule(Rule):
    """A primitive whose derivative is zero, or that has none to pass on."""

    def active_outputs(self, rules, eqn, active):
        return (False,) * len(eqn.out_avals)


class LocalRule(Rule):
    """A rule given by its pullbacks, one per operand, or by one for all operands jointly."""

    def __init__(self, pullbacks: Sequence[Callable | None], joint: bool = False):
        self.joint = joint
        self.pullbacks = tuple(pullbacks)
        self.names = tuple(f and tuple(inspect.signature(f).parameters) for f in pullbacks)
        unknown = {name for names in self.names for name in names or ()} - NAMES
        if unknown:
            raise TypeError(
                f"a backward rule has parameters {sorted(unknown)}, which name nothing: choose "
                f"from {', '.join(sorted(NAMES))}"
            )
        self.kept_names = functools.cache(self._kept_names)

    def active_outputs(self, rules, eqn, active):
        if not self.joint:  # an operand without a pullback passes no derivative on
            active = [a and f is not None for a, f in zip(active, self.pullbacks, strict=False)]
        return super().active_outputs(rules, eqn, active)

    def _wanted(self, active):
        if self.joint:
            return [0] if any(active) else []
        return [i for i, a in enumerate(active) if a and self.pullbacks[i] is not None]

    def _kept_names(self, active) -> tuple[str, ...]:
        names = {name for i in self._wanted(active) for name in self.names[i]}
        return tuple(sorted(names - STATIC))

    def forward(self, rules, eqn, active, values):
        if not self.joint and len(self.pullbacks) != len(values):
            raise TypeError(
                f"the rule of '{eqn.primitive}' has {len(self.pullbacks)} pullbacks, but the "
                f"equation at {eqn.source} has {len(values)} operands: give one per operand"
            )
        outs = eqn.bind(*values)
        available = named_values(eqn, values, outs)
        return outs, tuple(available[name] for name in self.kept_names(active))

    def pullback(self, rules, eqn, active, kept, cts):
        known = dict(zip(self.kept_names(active), kept, strict=True))
        known |= {"eqn": eqn, "rules": rules, "ct": cts[0], "arriving": tuple(cts)}
        if len(cts) > 1 or any("cts" in (names or ()) for names in self.names):
            known["cts"] = filled(cts, eqn)
        results: list = [None] * len(eqn.inputs)
        for i in self._wanted(active):
            result = self.pullbacks[i](**{name: known[name] for name in self.names[i]})
            if self.joint:
                results = list(result) if isinstance(result, tuple | list) else [result]
            else:
                results[i] = result
        if len(results) != len(eqn.inputs):
            raise TypeError(
                f"the rule of '{eqn.primitive}' returned {len(results)} cotangents for "
                f"{len(eqn.inputs)} operands (called at {eqn.source}): return one per operand"
            )
        return [
            fit(ct, aval, eqn) if a and ct is not None else None
            for ct, aval, a in zip(results, eqn.in_avals, active, strict=True)
        ]


def named_values(eqn: Equation, values: Sequence, outs: Sequence) -> dict[str, Any]:
    """What a rule may name of the forward pass; literals, perhaps Python numbers, as arrays."""
    pairs = zip(values, eqn.in_avals, strict=True)
    xs = tuple(v if hasattr(v, "shape") else scalar(v, aval) for v, aval in pairs)[: eqn.arity]
    named: dict[str, Any] = dict(zip(OPERANDS, xs, strict=False))
    return named | {"xs": xs, "out": outs[0] if outs else None, "outs": tuple(outs)}


def filled(cts: Sequence, eqn: Equation) -> tuple:
    """The cotangents of an equation's results, with zeros for None."""
    pairs = zip(cts, eqn.out_avals, strict=True)
    return tuple(zeros(aval) if ct is None else ct for ct, aval in pairs)


def fit(ct, aval, eqn: Equation):
    """Sum a cotangent over the axes along which its operand was broadcast; check its type.

    On an explicit mesh it also comes to lie as its operand does.
    """
    wanted = cotangent_aval(aval)
    if np.shape(ct) != wanted.shape:
        shape = np.shape(ct)
        if not wanted.shape:
            ct = lax.reduce_sum(ct, tuple(range(len(shape))))
        elif len(shape) == len(wanted.shape) and all(
            m in (n, 1) for n, m in zip(shape, wanted.shape, strict=True)
        ):
            pairs = zip(shape, wanted.shape, strict=True)
            axes = tuple(i for i, (n, m) in enumerate(pairs) if n != m)
            ct = lax.expand_dims(lax.reduce_sum(ct, axes), axes)
    if np.shape(ct) != wanted.shape or jax.dtypes.result_type(ct) != wanted.dtype:
        raise TypeError(
            f"the rule of '{eqn.label}' returned a cotangent of type "
            f"{type_of(ct).str_short()} for an operand of type {wanted.str_short()} (called at "
            f"{eqn.source}): a cotangent has the shape and dtype of its operand"
        )
    return laid_as(ct, wanted)


class Rules:
    """A choice of rules: the table, with what to do about primitives that are not in it.

    Attributes:
      strict: refuse primitives without a hand-written rule.
      policy: the checkpoint policy that says what may pass between the two passes, if any.
      linear: whether what is swept is linear, a program of tangents: its sweep is its transpose.
    """

    def __init__(self, strict: bool = False, policy: Callable | None = None, linear: bool = False):
        self.strict, self.policy, self.linear = strict, policy, linear
        self.under = functools.cache(self._under)

    def _under(self, policy: Callable | None) -> Rules:
        """The same rules under a checkpoint policy; the same object for the same policy."""
        return Rules(self.strict, policy, self.linear)

    @functools.cached_property
    def of_tangents(self) -> Rules:
        """The same rules for a program that is linear."""
        return self if self.linear else Rules(self.strict, None, linear=True)

    def of(self, eqn: Equation) -> Rule:
        """The rule for an equation.

        Raises:
          MissingRule: when strict and the primitive has no hand-written rule.
        """
        rule = LINEAR.get(eqn.primitive) if self.linear else None
        rule = rule or written_rule(eqn)
        if rule is not None:
            return rule
        if self.strict and any(is_inexact(aval) for aval in eqn.out_avals):
            derivable = ", or pass strict=False to derive it from the primitive's forward-mode rule"
            underivable = " (none can be derived, since it has no forward-mode rule either)"
            remedy = derivable if has_forward_rule(eqn.primitive) else underivable
            raise MissingRule(eqn.primitive, eqn.source, remedy)
        transposable = self.linear and has_transpose(eqn.primitive)
        return TRANSPOSED[0] if transposable else DERIVED[0]


TABLE: dict[Primitive, Rule] = {}
ABSENT: dict[str, Rule] = {}  # rows for primitives that this release of JAX does not have
LINEAR: dict[Primitive, Rule] = {}  # rows that differ where what is swept is linear
# The rules for all others, put here by `fbackprop.rules.derived`.
DERIVED: list[Rule] = []
TRANSPOSED: list[Rule] = []


def written_rule(eqn: Equation) -> Rule | None:
    """The hand-written rule of an equation: its own, or that of its primitive."""
    return eqn.rule or TABLE.get(eqn.primitive)


def register(key: str | Primitive, rule: Rule) -> Rule:
    """Enter a rule into the table; a second row for the same primitive is an error."""
    found = find_primitive(key) if isinstance(key, str) else key
    table: dict = ABSENT if found is None else TABLE
    if (found or key) in table:
        raise ValueError(f"primitive '{key}' already has a rule: one row per primitive")
    table[found or key] = rule
    return rule


def row(name: str, *pullbacks: Callable | None) -> None:
    """One row of the library's own table: a pullback per operand, None where there is none."""
    register(name, LocalRule(pullbacks))


def joint(name: str | Primitive) -> Callable[[_Function], _Function]:
    """Decorator for a row whose one function returns the cotangents of all operands."""

    def enter(function: _Function) -> _Function:
        register(name, LocalRule([function], joint=True))
        return function

    return enter


def zero(*names: str) -> None:
    """Rows of primitives without a derivative."""
    for name in names:
        register(name, ZeroRule())


def defrule(name: str | Primitive) -> Callable[[_Function], _Function]:
    """Give a primitive its backward rule.

    The decorated function receives the cotangent and whatever it names of the forward pass, and
    returns the cotangent of every operand: one value for a primitive of one operand, a tuple
    otherwise, None where an operand has no derivative. Its parameters are chosen by name:

    - ``ct``: cotangent of the result; ``cts``: a tuple of them, for several results;
      ``arriving``: the same with None for what is known to be zero;
    - ``x``, ``y``, ``z``: the first three operands; ``xs``: all of them;
    - ``out``, ``outs``: the result or results;
    - ``eqn``: the equation, with ``eqn.params``, ``eqn.in_avals`` and ``eqn.out_avals``;
    - ``rules``: the rules in force.

    Only what is named is kept from the forward pass. A cotangent has the shape and dtype of its
    operand; axes of size one along which the primitive broadcast are summed by the engine.

    Args:
      name: the primitive (a `jax.extend.core.Primitive`), or its name as printed in a jaxpr.

    Returns:
      A decorator; it gives the function back unchanged.

    Raises:
      ValueError: if this JAX has no primitive of that name, or if it has a rule already.
      TypeError: if the rule has a parameter of another name.

    Examples:
      >>> import jax, jax.numpy as jnp, fbackprop as fb
      >>> from jax.extend.core import Primitive
      >>> twice = Primitive("twice")
      >>> _ = twice.def_impl(lambda x: 2 * x)
      >>> _ = twice.def_abstract_eval(lambda x: x)
      >>> @fb.defrule(twice)
      ... def twice_rule(ct):
      ...     return 2 * ct
      >>> float(fb.grad(twice.bind)(3.0))
      2.0
    """
    if not isinstance(name, str | Primitive):
        raise TypeError(f"defrule takes a primitive or the name of one, but was given {name!r}")
    if isinstance(name, str) and find_primitive(name) is None:
        raise ValueError(
            f"this JAX ({jax.__version__}) has no primitive called '{name}': use the name that "
            "jax.make_jaxpr prints, or pass the primitive itself"
        )
    return joint(name)
