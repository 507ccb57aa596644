"""Rules for one sweep: a program whose equations have other backward rules.

The equations that a mapping of rules names are found, in calls, loops, branches and checkpoints
too, and put back as equations that run as before and carry their own rule
(`fbackprop.override`). What the rules hold in arrays becomes further inputs of the program, and of
the bodies in between; nothing else of it changes, and no sweep needs to know.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import lax

from fbackprop.bodies import checkpoint_body, scan_body
from fbackprop.override import Override, Template, named_by, template_of
from fbackprop.program import (
    TAP,
    Equation,
    Literal,
    Primitive,
    Program,
    Var,
    as_array,
    bind_changed,
    interpret,
    memoized,
    program_of,
    regrouped,
    scan_counts,
    shaped,
    trace,
    trace_jaxpr,
    type_of,
)
from fbackprop.rules.calls import Cond, Inline, Remat
from fbackprop.rules.loops import Scan
from fbackprop.table import ZeroRule, written_rule

Key: TypeAlias = "str | Primitive | Anywhere | Callable[[Equation], bool]"
DATA, PARAMETER = "data", "parameter"  # what a value depends on; on constants alone: None
Around = tuple[tuple[str, str], ...]  # label and scope of each equation around


class Seen(Equation):
    """An equation as a predicate sees it.

    Attributes:
      path: the labels of the calls, loops and branchings around it, the outermost first, and its
        own: ``("jit:mlp", "dot_general")``.
      weights: where parameters meet data, which operands depend on the parameters (the first
        differentiated argument) alone; elsewhere false for all.
    """

    __slots__ = ("_around", "weights", "_arity")

    def __init__(self, eqn: Equation, around: Around, weights: tuple[bool, ...]):
        super().__init__(eqn.jaxpr_equation)
        self._around, self.weights, self._arity = around, weights, eqn.arity

    @property
    def arity(self) -> int:
        return self._arity

    @property
    def path(self) -> tuple[str, ...]:
        return (*(label for label, _ in self._around), self.label)

    @property
    def scope(self) -> str:
        """The `jax.named_scope`s around it, ``outer/inner``, those of enclosing calls included."""
        scopes = (*(scope for _, scope in self._around), super().scope)
        return "/".join(scope for scope in scopes if scope)


class Twinned(NamedTuple):
    """A rule that sees beside each weight its twin: that weight, computed from other parameters.

    Attributes:
      rule: it may name `twins`, for each operand its twin, or None if it depends on data or on no
        parameter.
      twins: a pytree like the parameters (the first differentiated argument), of other values, such
        as the feedback weights of feedback alignment. What the function computes from parameters
        alone (transposes, slices, casts) is computed from these too.
    """

    rule: Callable
    twins: Any


@dataclasses.dataclass(frozen=True)
class Anywhere:
    """A key of several names, none of which has to be there.

    Attributes:
      names: of primitives, or of called functions, plain Python functions included.
    """

    names: tuple[str, ...]

    def __post_init__(self):
        is_tuple = isinstance(self.names, tuple) and self.names
        if not is_tuple or not all(isinstance(name, str) and name for name in self.names):
            raise TypeError(f"Anywhere({self.names!r}): give a tuple of names")


class Severed(NamedTuple):
    """In the place of a rule: cut the result off from what follows, for direct feedback.

    Its cotangent is that of the one result that is `Broadcast` after it, times the feedback.

    Attributes:
      feedback: an array, (*features, C) for a result (..., *features) and a broadcast one (..., C);
        or a list of them, one for each time that the key matches, in order of execution.
    """

    feedback: Any


class Broadcast(NamedTuple):
    """In the place of a rule: send the result's cotangent to what was `Severed` before it too."""


class Entry(NamedTuple):
    """One rule and what it is for; static.

    Attributes:
      key: as the user gave it.
      kind: `Override` for a rule, `ZeroRule` for None, `Severed` or `Broadcast`.
      template: the rule, or the feedback, without its arrays.
      names: the rule's parameters.
    """

    key: Key
    kind: type
    template: Template
    names: tuple[str, ...] = ()

    def matches(self, seen: Seen) -> bool:
        if isinstance(self.key, str):
            return self.key in (seen.primitive.name, seen.name)
        if isinstance(self.key, Anywhere):
            return not {seen.primitive.name, seen.name}.isdisjoint(self.key.names)
        if isinstance(self.key, Primitive):
            return self.key is seen.primitive
        return bool(self.key(seen))


def _entry(key, rule) -> tuple[Entry, list]:
    """An entry and its arrays."""
    what = _checked(key)
    if isinstance(rule, Severed):
        feedback = rule.feedback
        template, arrays = template_of(feedback if isinstance(feedback, list) else [feedback])
        return Entry(key, Severed, template), arrays
    if rule is None or isinstance(rule, Broadcast):
        kind = ZeroRule if rule is None else Broadcast
        return Entry(key, kind, template_of(())[0]), []
    names = named_by(rule, what)
    template, arrays = template_of(rule)
    return Entry(key, Override, template, names), arrays


class Overrides:
    """A mapping of rules, checked, its arrays apart.

    Attributes:
      entries: the static part.
      arrays: for each entry those of its rule.
      twins: a pytree like the parameters, or None.
    """

    def __init__(self, rules: Mapping[Key, Any]):
        if not isinstance(rules, Mapping):
            raise TypeError(
                f"rules={rules!r} is not a mapping: give a dict from the name of a primitive or of "
                "a function, or a predicate, to a rule"
            )
        entries: list[Entry] = []
        self.arrays: list[list[jax.Array]] = []
        twins: list[Any] = []
        for key, rule in rules.items():
            if isinstance(rule, Twinned):
                rule, others = rule
                twins.append(others)
            entry, arrays = _entry(key, rule)
            entries.append(entry)
            self.arrays.append([as_array(x) for x in arrays])
        if any(others is not twins[0] for others in twins):
            raise ValueError("rules hold several sets of twins: give all of them the same one")
        self.entries = tuple(entries)
        self.twins = twins[0] if twins else None

    def applied(self, program: Program, first: int, params) -> tuple[Program, list]:
        """A program with these rules, and the arrays that it takes before its other inputs.

        Args:
          program: the function.
          first: how many inputs come before the parameters.
          params: the parameters; their leaves are the next inputs.

        Raises:
          ValueError: if a name matches nothing, or if the twins are not like the parameters.
        """
        n = len(jax.tree.leaves(params))
        twins = self._twins_like(params)
        states = [DATA] * first + [PARAMETER] * n
        states += [DATA] * (len(program.inputs) - len(states))
        twinned = [False] * len(program.inputs)
        if twins:
            twinned[first : first + n] = [True] * n
        find = functools.partial(_Plan, program, self.entries, tuple(states), tuple(twinned), ())
        plan = find(frozenset())
        # Names that were not found may be of plain Python functions.
        functions = {*self._missing(plan), *self._anywhere()} - plan.names
        if functions:
            plan = find(frozenset(functions))
        self._check_found(plan)
        if not plan.found:
            return program, []
        arrays = [x for i in sorted(plan.found) for x in self.arrays[i]]
        extra = [*arrays, *twins]

        def run(*values):
            return plan.run(values[len(extra) :], values[: len(extra)])

        return trace(run, [*map(type_of, extra), *program.in_avals]), extra

    def _twins_like(self, params) -> list:
        if self.twins is None:
            return []
        leaves, structure = jax.tree.flatten(self.twins)
        expected = jax.tree.structure(params)
        if structure != expected:
            raise ValueError(
                f"the twins have the structure {structure}, but the parameters {expected}: give "
                "one twin for each parameter"
            )
        for (path, leaf), twin in zip(
            jax.tree_util.tree_leaves_with_path(params), leaves, strict=True
        ):
            got, wanted = shaped(as_array(twin)), shaped(as_array(leaf))
            if (got.shape, got.dtype) != (wanted.shape, wanted.dtype):
                raise ValueError(
                    f"the twin of {jax.tree_util.keystr(path) or 'the parameters'} is of type "
                    f"{got.str_short()}, but the parameter of {wanted.str_short()}"
                )
        return [as_array(x) for x in leaves]

    def _missing(self, plan: _Plan) -> list[str]:
        """The names that match nothing."""
        entries = enumerate(self.entries)
        return [
            str(entry.key)
            for i, entry in entries
            if isinstance(entry.key, str | Primitive) and i not in plan.found
        ]

    def _anywhere(self) -> set[str]:
        keys = (entry.key for entry in self.entries if isinstance(entry.key, Anywhere))
        return {name for key in keys for name in key.names}

    def _check_found(self, plan: _Plan) -> None:
        for name in self._missing(plan):
            known = ", ".join(sorted(plan.labels)) or "no equations"
            raise ValueError(
                f"rules: nothing in the function is called '{name}', among {known} and the Python "
                "functions that it calls; what is within custom_jvp and custom_vjp functions and "
                "while loops cannot be given a rule"
            )


def _checked(key) -> str:
    """How to call a key in messages.

    Raises:
      TypeError: for what can be no key.
    """
    if isinstance(key, Primitive) or (isinstance(key, str) and key):
        return repr(str(key))
    if isinstance(key, Anywhere):
        return " or ".join(map(repr, key.names))
    if callable(key):
        return getattr(key, "__name__", repr(key))
    raise TypeError(
        f"rules: {key!r} names no equation: give the name of a primitive or of a function, or a "
        "predicate"
    )


# --- finding the equations ------------------------------------------------------------------------


class _Step(NamedTuple):
    """An equation that changes.

    Attributes:
      entry: which rule it gets, None for one that holds such.
      rule: that rule, static, if it is one.
      twins: which operands' twins it takes.
      bodies: plans for the programs that it holds.
    """

    entry: int | None
    rule: Any
    twins: tuple[bool, ...]
    bodies: tuple[_Plan, ...]


class _Plan:
    """Which equations of a program change.

    Args:
      program: in which the Python `functions` of these names are put together again.
      entries: the rules.
      states, twinned: for each input what it depends on, and whether it has a twin.
      around: where the program stands, if a predicate may ask.

    Attributes:
      steps: for each equation a `_Step`, or None.
      found: the entries that match something.
      labels, names: of all equations, those of bodies included.
    """

    def __init__(self, program, entries, states, twinned, around: Around, functions: frozenset):
        self.program = program = regrouped(program, functions) if functions else program
        self.entries, self.twinned, self.functions = entries, twinned, functions
        self.found: set[int] = set()
        self.labels: set[str] = set()
        self.names: set[str] = set()
        state = dict(zip(program.inputs, states, strict=True))
        twins = {v for v, t in zip(program.inputs, twinned, strict=True) if t}
        self.steps: list[_Step | None] = []
        self._doubled: set[Equation] = set()  # those that compute a twin too
        self._traced: dict[tuple, Any] = {}
        for eqn in program.equations:
            of = [None if isinstance(v, Literal) else state.get(v) for v in eqn.inputs]
            mine = tuple(isinstance(v, Var) and v in twins for v in eqn.inputs)
            self.labels.add(eqn.label)
            self.names |= {eqn.primitive.name, eqn.name}
            step = self._step(eqn, of, mine, around)
            self.steps.append(step)
            result = (
                DATA if DATA in of or eqn.has_effects else PARAMETER if PARAMETER in of else None
            )
            state.update((v, result) for v in eqn.outputs)
            if result == PARAMETER and any(mine):
                self._doubled.add(eqn)
                twins.update(eqn.outputs)

    def _step(self, eqn: Equation, of: list, twins, around: Around) -> _Step | None:
        meets = DATA in of
        weights = tuple(meets and s == PARAMETER for s in of)
        seen = Seen(eqn, around, weights)
        for i, entry in enumerate(self.entries):
            if not entry.matches(seen):
                continue
            self.found.add(i)
            if entry.kind is not Override:
                return _Step(i, ZeroRule() if entry.kind is ZeroRule else None, (), ())
            wanted = twins if "twins" in entry.names and meets else (False,) * len(twins)
            weights = weights[: eqn.arity]
            return _Step(i, Override(entry.template, entry.names, weights, wanted), wanted, ())
        bodies = self._bodies(eqn, of, twins, around)
        for body in bodies:
            self.found |= body.found
            self.labels |= body.labels
            self.names |= body.names
        if not any(body.found for body in bodies):
            return None
        return _Step(None, None, twins, bodies)

    def _bodies(self, eqn: Equation, of, twins, around: Around) -> tuple[_Plan, ...]:
        rule = written_rule(eqn)
        by_place = any(callable(entry.key) for entry in self.entries)
        around = (*around, (eqn.label, eqn.scope)) if by_place else ()

        def body(jaxpr, of, twins):
            return _plan(
                program_of(jaxpr), self.entries, tuple(of), tuple(twins), around, self.functions
            )

        if isinstance(rule, Inline):
            return (body(eqn.params[rule.jaxpr], of, twins),)
        if isinstance(rule, Cond):
            return tuple(body(jaxpr, of[1:], twins[1:]) for jaxpr in eqn.params["branches"])
        if isinstance(rule, Scan):
            kept = _unchanged(eqn)
            of = [s if k else DATA for s, k in zip(of, kept, strict=True)]
            twins = [t and k for t, k in zip(twins, kept, strict=True)]
            return (body(eqn.params["jaxpr"], of, twins),)
        return ()

    # --- running

    def run(self, values: Sequence, extra: Sequence) -> list:
        """Trace the changed program.

        Args:
          values: its inputs.
          extra: the arrays of the rules found, entry by entry, and the twins of inputs.
        """
        remaining = iter(extra)
        arrays = {
            i: [next(remaining) for _ in range(self.entries[i].template.n_arrays)]
            for i in sorted(self.found)
        }
        twins = {
            v: next(remaining) for v, t in zip(self.program.inputs, self.twinned, strict=True) if t
        }
        direct, steps = _Direct([], {}), iter(self.steps)

        def apply(eqn, operands):
            step = next(steps)
            others = [twins.get(v) if isinstance(v, Var) else None for v in eqn.inputs]
            if step is None:
                outs = eqn.stage(*operands)
            elif step.entry is None:
                outs = _run_bodies(eqn, step, operands, others, arrays)
            elif step.rule is None:
                outs = direct.run(eqn, operands, self.entries[step.entry], arrays[step.entry])
            else:
                taken = [x for x, t in zip(others, step.twins, strict=False) if t]
                mine = [*arrays[step.entry], *taken]
                outs = bind_changed(eqn, step.rule, operands, mine)
            if eqn in self._doubled:
                pairs = zip(operands, others, strict=True)
                doubled = eqn.stage(*(x if twin is None else twin for x, twin in pairs))
                twins.update(zip(eqn.outputs, doubled, strict=True))
            return outs

        results = interpret(self.program, values, apply)
        direct.check_sent()
        return results

    def traced(self, extra: tuple):
        """The closed jaxpr of the changed program: of its inputs and `extra` of these types."""
        if extra not in self._traced:
            n = len(self.program.inputs)
            avals = [*self.program.in_avals, *extra]
            self._traced[extra] = trace_jaxpr(lambda *xs: self.run(xs[:n], xs[n:]), avals)
        return self._traced[extra]


class _Direct(NamedTuple):
    """What one program severs, until it is broadcast to.

    Attributes:
      waiting: labels, results and feedback.
      counts: how often each entry matched.
    """

    waiting: list[tuple[str, Any, Any]]
    counts: dict[Entry, int]

    def run(self, eqn: Equation, operands: Sequence, entry: Entry, arrays: Sequence) -> list:
        outs = eqn.stage(*operands)
        if entry.kind is Broadcast:
            outs = [self._send(eqn, outs[0]), *outs[1:]]
            self.waiting.clear()
            return outs
        k = self.counts[entry] = self.counts.get(entry, 0) + 1
        if k > len(arrays):
            raise ValueError(
                f"there is feedback for {len(arrays)} results of {entry.key!r}, but it matches "
                f"again at {eqn.source}: give a list of one array for each"
            )
        self.waiting.append((eqn.label, outs[0], arrays[k - 1]))
        return list(map(lax.stop_gradient, outs))

    def _send(self, eqn: Equation, result):
        """The result, tapped by what sends its cotangent back through the feedback."""
        for label, severed, feedback in self.waiting:
            n = feedback.ndim - 1
            lead = severed.shape[: max(0, severed.ndim - n)]
            wanted = (*severed.shape[len(lead) :], *result.shape[len(lead) :])
            if feedback.shape != wanted or result.shape[: len(lead)] != lead:
                raise ValueError(
                    f"the feedback from '{eqn.label}', of shape {result.shape}, to '{label}', of "
                    f"shape {severed.shape}, is of shape {feedback.shape}: give (*features, C) "
                    "for a result (..., *features) and an output (..., C), and map over the "
                    "gradient, if a `vmap` within the function moved their axes"
                )
            axes = tuple(range(len(lead), severed.ndim)), tuple(range(n))
            nudge = lax.dot_general(severed, feedback.astype(severed.dtype), (axes, ((), ())))
            result = TAP.bind(result, nudge.astype(result.dtype))
        return result

    def check_sent(self) -> None:
        if self.waiting:
            raise ValueError(
                f"the error signal for '{self.waiting[0][0]}' comes from no output: name one to be "
                "broadcast that follows it in the same function, outside loops and branches"
            )


@memoized
def _plan(program: Program, entries, states, twinned, around, functions) -> _Plan:
    """The plan of a body, made once for each program, rules and place."""
    return _Plan(program, entries, states, twinned, around, functions)


def _unchanged(eqn: Equation) -> list[bool]:
    """Which operands of a scan are the same, or slices of the same, in every iteration."""
    n_consts, n_carry = scan_counts(eqn.params)
    body = program_of(eqn.params["jaxpr"])
    carry = zip(body.inputs[n_consts : n_consts + n_carry], body.outputs, strict=False)
    kept = [True] * n_consts + [a is b for a, b in carry]
    return kept + [True] * (len(eqn.inputs) - len(kept))


def _run_bodies(eqn: Equation, step: _Step, operands: list, twins: list, arrays: dict) -> list:
    """Run an equation with changed bodies."""
    rule, bodies = written_rule(eqn), step.bodies
    if isinstance(rule, Cond):
        index, *operands = operands
        taken = [x for x, t in zip(twins[1:], bodies[0].twinned, strict=True) if t]

        def branch(body: _Plan):
            def run(operands, arrays, taken):
                extra = [*(x for i in sorted(body.found) for x in arrays[i]), *taken]
                return body.run(operands, extra)

            return run

        with eqn.context():
            return list(lax.switch(index, list(map(branch, bodies)), operands, arrays, taken))
    (body,) = bodies
    n_same = len(operands)
    if isinstance(rule, Scan):
        n_same = sum(scan_counts(eqn.params))
    given = [x for x, t in zip(twins, body.twinned, strict=True) if t]
    n_fixed = sum(body.twinned[:n_same])
    fixed = [*(x for i in sorted(body.found) for x in arrays[i]), *given[:n_fixed]]
    each = given[n_fixed:]
    types = [v for v, t in zip(body.program.in_avals, body.twinned, strict=True) if t]
    n_arrays = len(fixed) - n_fixed
    jaxpr = body.traced((*map(type_of, fixed[:n_arrays]), *types))
    with eqn.context():
        if isinstance(rule, Scan):
            return scan_body(eqn, jaxpr, operands, fixed=fixed, each=each)
        values = [*operands, *fixed]
        if isinstance(rule, Remat):
            return checkpoint_body(eqn, jaxpr, values)
        assert isinstance(rule, Inline)
        return rule.run(eqn, jaxpr, values)
