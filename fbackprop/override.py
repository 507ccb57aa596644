"""A backward rule of the user's own for single equations, and what it may ask for.

A rule is written like one of the table (`fbackprop.table`): a function that names what it reads
of the equation. It may also name what only makes sense where a rule replaces another: `default`,
the pullback that it replaces, and `active`, which operands are differentiated.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fbackprop.program import (
    Changed,
    Equation,
    cotangent_aval,
    is_inexact,
    memoized,
    trace_jaxpr,
    zeros,
)
from fbackprop.split import spread
from fbackprop.table import (
    NAMES,
    OPERANDS,
    STATIC,
    Rule,
    Rules,
    ZeroRule,
    filled,
    fit,
    named_values,
)

OWN_NAMES = frozenset({"default", "active", "weights", "twins"})


class Template(NamedTuple):
    """A rule without its arrays: what is static about it.

    Attributes:
      structure: the tree of the rule, if it is a pytree.
      fixed: the leaves of it that are not arrays, None in the place of arrays.
    """

    structure: Any
    fixed: tuple

    def rule(self, arrays: Sequence) -> Callable:
        remaining = iter(arrays)
        return self.structure.unflatten(next(remaining) if x is None else x for x in self.fixed)

    @property
    def n_arrays(self) -> int:
        return sum(x is None for x in self.fixed)


def template_of(rule: Any) -> tuple[Template, list]:
    """A rule, a function or a pytree that can be called, apart from its arrays."""
    leaves, structure = jax.tree.flatten(rule)
    is_array = [isinstance(x, jax.Array | np.ndarray) for x in leaves]
    fixed = tuple(None if a else x for x, a in zip(leaves, is_array, strict=True))
    return Template(structure, fixed), [x for x, a in zip(leaves, is_array, strict=True) if a]


def named_by(rule: Callable, what: str) -> tuple[str, ...]:
    """The parameters of a rule.

    Raises:
      TypeError: if it is not a function, or if a parameter names nothing.
    """
    if not callable(rule):
        raise TypeError(
            f"the rule for {what} is {rule!r}: give a function of the cotangent `ct` and of what "
            "it reads of the equation, or None to stop the cotangent there"
        )
    try:
        parameters = inspect.signature(rule).parameters.values()
    except ValueError:  # some built-in functions have none
        raise TypeError(
            f"the rule for {what} is {rule!r}, whose parameters have no names"
        ) from None
    names = tuple(p.name for p in parameters if p.default is p.empty)
    unknown = set(names) - NAMES - OWN_NAMES
    if unknown or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise TypeError(
            f"the rule for {what} has parameters {sorted(unknown) or '*args'}, which name nothing: "
            f"choose from {', '.join(sorted(NAMES | OWN_NAMES))}"
        )
    return names


class Override(Rule):
    """The rule of one changed equation. Its operands are the equation's, its arrays, its twins.

    Args:
      template: the rule without its arrays.
      names: the rule's parameters.
      weights: which operands depend on parameters alone.
      twins: which of them come with a twin, as further operands.
    """

    def __init__(
        self,
        template: Template,
        names: tuple[str, ...],
        weights: tuple[bool, ...] = (),
        twins: tuple[bool, ...] = (),
    ):
        self.template, self.names, self.weights, self.twins = template, names, weights, twins
        self.kept_names = tuple(sorted(set(names) - STATIC - OWN_NAMES))

    def active_outputs(self, rules, eqn, active):
        own = any(active[: len(eqn.original.inputs)])
        return tuple(own and is_inexact(aval) for aval in eqn.out_avals)

    def leaves(self, eqn: Changed, operand: int) -> bool:
        """Whether the cotangent of an operand is left to the default rule."""
        everything = tuple(map(is_inexact, eqn.in_avals))
        return _left_to_default(eqn, self, everything)[operand]

    def _default_active(self, eqn: Changed, active) -> tuple[bool, ...]:
        """The operands for which the default pullback may be wanted."""
        active = active[: len(eqn.original.inputs)]
        if "default" in self.names:
            return active
        left = _left_to_default(eqn, self, active)
        return tuple(a and i < len(left) and left[i] for i, a in enumerate(active))

    def forward(self, rules, eqn, active, values):
        original = eqn.original
        n = len(original.inputs)
        operands, extra = values[:n], values[n:]
        wanted = self._default_active(eqn, active)
        default, moving = _default(rules, original, wanted)
        if moving:
            outs, kept = default.forward(rules, original, wanted, operands)
        else:
            outs, kept = original.bind(*operands), ()
        return outs, (kept, self._read(original, operands, outs), list(extra))

    def _read(self, eqn: Equation, operands: Sequence, outs: Sequence) -> list:
        """What the rule names of the forward pass."""
        named = named_values(eqn, operands, outs)
        for name in self.kept_names:
            if name not in named:
                raise TypeError(
                    f"the rule of '{eqn.label}' reads the operand '{name}', but the equation has "
                    f"{eqn.arity} (called at {eqn.source}): they are {', '.join(OPERANDS)}, in "
                    "this order"
                )
        return [named[name] for name in self.kept_names]

    def pullback(self, rules, eqn, active, kept, cts):
        original = eqn.original
        kept_default, named, extra = kept
        wanted = self._default_active(eqn, active)

        def default(cts, operands):
            rule, moving = _default(rules, original, wanted)
            if not moving:
                return [None] * len(wanted)
            if operands is None:
                return rule.pullback(rules, original, wanted, kept_default, cts)
            operands = [*operands, *(zeros(a) for a in original.in_avals[len(operands) :])]
            _, tape = rule.forward(rules, original, wanted, operands)
            return rule.pullback(rules, original, wanted, tape, cts)

        active = active[: len(original.inputs)]
        call = _Call(self, original, active, rules, default)
        known = dict(zip(self.kept_names, named, strict=True))
        results = call(known, extra, cts)
        if any(r is ... and a for r, a in zip(results, active, strict=False)):
            by_default = default(cts, None)
            results = [d if r is ... else r for r, d in zip(results, by_default, strict=False)]
        found = [
            fit(ct, aval, original) if a and ct is not None else None
            for ct, aval, a in zip(results, original.in_avals, active, strict=False)
        ]
        return [*found, *(None,) * (len(eqn.inputs) - len(found))]


class _Call(NamedTuple):
    """One call of a rule's function."""

    override: Override
    eqn: Equation
    active: tuple[bool, ...]
    rules: Any
    default: Callable

    def __call__(self, known: dict, extra: Sequence, cts: Sequence) -> list:
        """What the rule returns for each operand: a cotangent, None, or ``...``."""
        override, eqn = self.override, self.eqn
        n = override.template.n_arrays
        remaining = iter(extra[n:])
        full = filled(cts, eqn)
        known = known | {
            "ct": full[0] if full else None,
            "cts": full,
            "arriving": tuple(cts),
            "eqn": eqn,
            "rules": self.rules,
            "active": self.active[: eqn.arity],
            "weights": override.weights,
            "twins": tuple(next(remaining) if t else None for t in override.twins),
            "default": self._default,
        }
        rule = override.template.rule(extra[:n])
        found = rule(**{name: known[name] for name in override.names})
        if not isinstance(found, tuple | list):
            found = [found] * eqn.arity if found is ... else [found]
        if len(found) != eqn.arity:
            raise TypeError(
                f"the rule of '{eqn.label}' returned {len(found)} cotangents for {eqn.arity} "
                f"operands (called at {eqn.source}): return one per operand, None for zero and ... "
                "for what the default rule gives"
            )
        return list(found)

    def _default(self, ct, operands=None):
        """The default pullback: cotangents of the operands, one if there is one operand.

        Args:
          ct: the cotangent of the result, or the tuple of them for several results.
          operands: where to pull back; by default the equation's own operands.
        """
        eqn, cts = self.eqn, ct if isinstance(ct, tuple | list) else (ct,)
        wanted = [aval.shape for aval in eqn.out_avals]
        given = [shape if x is None else np.shape(x) for x, shape in zip(cts, wanted, strict=False)]
        if given != wanted or len(cts) != len(wanted):
            raise TypeError(
                f"the rule of '{eqn.label}' gave `default` cotangents of shapes "
                f"{list(map(np.shape, cts))} (called at {eqn.source}): its results have {wanted}"
            )
        if operands is not None:
            is_tuple = isinstance(operands, tuple | list)
            if not is_tuple or len(operands) != eqn.arity:
                said = f"{len(operands)} operands" if is_tuple else "no tuple of operands"
                raise TypeError(
                    f"the rule of '{eqn.label}' gave `default` {said} (called at {eqn.source}): "
                    f"give all {eqn.arity} in a tuple"
                )
        found = self.default(cts, operands)[: self.eqn.arity]
        return found[0] if self.eqn.arity == 1 else tuple(found)


def _default(rules, original: Equation, active) -> tuple[Rule, bool]:
    """The rule that is replaced, and whether it passes a derivative on."""
    if not any(active):
        return ZeroRule(), False
    rule = rules.of(original)
    return rule, any(rule.active_outputs(rules, original, active))


@memoized
def _left_to_default(eqn: Changed, override: Override, active) -> tuple[bool, ...]:
    """For each operand whether the rule answers ``...``: it is run once on abstract values."""
    original = eqn.original
    answer: tuple[bool, ...] = ()
    n, extra = len(original.inputs), eqn.in_avals[len(original.inputs) :]

    def run(*values):
        nonlocal answer
        pieces = iter(values)
        operands, rest, outs, moving = (
            [next(pieces) for _ in avals] for avals in (original.in_avals, extra, *results)
        )
        cts = spread(moving, tuple(map(is_inexact, original.out_avals)))
        default = functools.partial(_zeros_of, original, active)
        read = override._read(original, operands, outs)
        known = dict(zip(override.kept_names, read, strict=True))
        found = _Call(override, original, active[:n], Rules(), default)(known, rest, cts)
        answer = tuple(x is ... for x in found)
        return []

    moving = [cotangent_aval(aval) for aval in original.out_avals if is_inexact(aval)]
    results = original.out_avals, moving
    trace_jaxpr(run, [*original.in_avals, *extra, *original.out_avals, *moving])
    return answer


def _zeros_of(eqn: Equation, active, cts, operands) -> list:
    return [zeros(aval) if a else None for aval, a in zip(eqn.in_avals, active, strict=False)]
