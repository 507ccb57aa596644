"""The forward pass that keeps, and the backward sweep that reads.

Both walk a program's equations and ask each equation's rule what to do; neither knows a primitive
by name. The tape is the list of what the rules kept, one entry per active equation, in order of
execution: a pytree of arrays, since everything static is in the program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jax import lax

from fbackprop.program import (
    UNKNOWN_LINE,
    Equation,
    Literal,
    Program,
    Var,
    as_array,
    is_inexact,
    memoized,
    read,
    trace,
    type_of,
)
from fbackprop.table import MissingRule, Rules

Mask = tuple[bool, ...]


class Activity:
    """Which variables of a program depend on its active inputs.

    Attributes:
      steps: for each equation, None or the mask of its active operands.
      outputs: mask over the program's outputs.
    """

    __slots__ = ("steps", "outputs", "variables")

    def __init__(self, rules: Rules, program: Program, active: Mask):
        live = {v for v, a in zip(program.inputs, active, strict=True) if a and is_inexact(v.aval)}
        self.steps: list[Mask | None] = []
        for eqn in program.equations:
            mask = tuple(isinstance(v, Var) and v in live for v in eqn.inputs)
            try:
                outs = rules.of(eqn).active_outputs(rules, eqn, mask) if any(mask) else ()
            except MissingRule as error:
                raise error.seen_from(eqn) from None
            live.update(v for v, a in zip(eqn.outputs, outs, strict=False) if a)
            self.steps.append(mask if any(outs) else None)
        self.outputs = tuple(isinstance(v, Var) and v in live for v in program.outputs)
        self.variables = frozenset(live)


@memoized
def activity(program: Program, rules: Rules, active: Mask) -> Activity:
    """The `Activity` of `program` when the inputs marked in `active` are differentiated."""
    return Activity(rules, program, active)


def reversible(rules: Rules, program: Program, active: Mask) -> bool:
    """Whether every active equation has a way back."""
    steps = activity(program, rules, active).steps
    return all(
        mask is None or rules.of(eqn).reversible
        for eqn, mask in zip(program.equations, steps, strict=True)
    )


def forward(rules: Rules, program: Program, active: Mask, values: Sequence):
    """Run `program` on `values`; returns its outputs and the tape."""
    env: dict = {v: as_array(x) for v, x in program.constants}  # rules see no NumPy arrays
    env.update(zip(program.inputs, values, strict=True))
    tape = []
    steps = activity(program, rules, active).steps
    for eqn, mask, dead in zip(program.equations, steps, program.dying(), strict=True):
        operands = [read(env, v) for v in eqn.inputs]
        if mask is None:
            outs = eqn.bind(*operands)
        else:
            try:
                outs, kept = rules.of(eqn).forward(rules, eqn, mask, operands)
            except Exception as error:
                _locate(error, eqn)
                raise
            tape.append(kept)
        env.update(zip(eqn.outputs, outs, strict=True))
        for v in dead:
            env.pop(v, None)
    return [read(env, v) for v in program.outputs], tape


def backward(rules: Rules, program: Program, active: Mask, tape: list, cts: Sequence) -> list:
    """Sweep `program` from its outputs' cotangents to its inputs'; None stands for zero.

    The tape is consumed: each entry is dropped as soon as it is read, which frees its arrays.
    """
    flow = activity(program, rules, active)
    pending: dict[Var, object] = {}
    tape = list(tape)

    def add(v, ct):
        if ct is not None and v in flow.variables:
            pending[v] = lax.add(pending[v], ct) if v in pending else ct

    for v, ct in zip(program.outputs, cts, strict=True):
        if not isinstance(v, Literal):
            add(v, ct)
    for eqn, mask in zip(reversed(program.equations), reversed(flow.steps), strict=True):
        if mask is None:
            continue
        kept = tape.pop()
        arriving = [pending.pop(v, None) for v in eqn.outputs]
        if all(ct is None for ct in arriving):
            continue
        try:
            with eqn.context():
                leaving = rules.of(eqn).pullback(rules, eqn, mask, kept, arriving)
                for v, ct in zip(eqn.inputs, leaving, strict=True):
                    if not isinstance(v, Literal):
                        add(v, ct)
        except Exception as error:
            _locate(error, eqn)
            raise
    return [pending.get(v) for v in program.inputs]


def _locate(error: Exception, eqn: Equation) -> None:
    """Note in the error where the user called what could not be differentiated.

    The innermost equation whose line is known says it; those around it stay silent.
    """
    if eqn.source != UNKNOWN_LINE and not any(NOTE in n for n in getattr(error, "__notes__", ())):
        error.add_note(f"{NOTE} '{eqn.primitive}', called at {eqn.source}")


NOTE = "While differentiating"


def pull(rules: Rules, program: Program, active: Mask, values: Sequence, cts: Sequence) -> list:
    """Cotangents of a program's inputs from those of its outputs, by both passes at once."""
    _, tape = forward(rules, program, active, values)
    return backward(rules, program, active, tape, cts)


def pull_function(rules: Rules, function: Callable, values: Sequence, cts: Sequence) -> list:
    """The same for a function of arrays that returns a list: for rules written as functions."""
    avals = [type_of(x) for x in values]
    return pull(rules, trace(function, avals), tuple(map(is_inexact, avals)), values, cts)
