"""Rules derived from forward mode: sweep the tangent program, which is linear.

The program of a primitive's tangents, given its operands, is linear in the tangents of its
operands; the backward sweep of a linear program is its transpose. So a primitive with a
forward-mode rule, or a user's `custom_jvp` function, has a backward rule already.
"""

from __future__ import annotations

import contextlib
import contextvars

import jax

from fbackprop.program import (
    Equation,
    evaluate,
    is_inexact,
    memoized,
    primitive,
    program_of,
    tangent_aval,
    trace,
    transpose,
)
from fbackprop.rules.calls import Inline
from fbackprop.split import Split, nonzero, spread
from fbackprop.table import DERIVED, LINEAR, TRANSPOSED, MissingRule, Rule, Rules, register


@memoized
def tangent_program(eqn: Equation, active):
    """The program (operands, tangents of the active ones) -> (results, their tangents)."""
    n = len(eqn.inputs)
    carries = [is_inexact(aval) for aval in eqn.out_avals]

    def run(*values):
        operands, tangents = values[:n], values[n:]
        moving = [x for x, a in zip(operands, active, strict=True) if a]

        def apply(*moving):
            remaining = iter(moving)
            return eqn.bind(
                *(next(remaining) if a else x for x, a in zip(operands, active, strict=True))
            )

        outs, tangents_out = jax.jvp(apply, tuple(moving), tuple(tangents))
        return [*outs, *(t for t, c in zip(tangents_out, carries, strict=True) if c)]

    avals = list(eqn.in_avals)
    avals += [tangent_aval(aval) for aval, a in zip(eqn.in_avals, active, strict=True) if a]
    return trace(run, avals), carries


@memoized
def _split(eqn: Equation, rules: Rules, active) -> Split:
    program, carries = tangent_program(eqn, active)
    n_in, n_tangents = len(eqn.inputs), sum(active)
    n_out, n_moving = len(eqn.outputs), sum(carries)
    tangents = (False,) * n_in + (True,) * n_tangents
    with _no_recurrence(eqn, active):
        return Split(
            rules.of_tangents,
            program,
            tangents,
            free_inputs=(True,) * len(tangents),
            free_outputs=(True,) * (n_out + n_moving),
            unknown_inputs=tangents,
            computed_outputs=(True,) * n_out + (False,) * n_moving,
        )


@contextlib.contextmanager
def _no_recurrence(eqn: Equation, active):
    """An error where deriving a primitive's rule leads back to the same primitive.

    That it has more operands then makes it no better, as the tangents of a `custom_vmap` function:
    it would come back for ever.
    """
    avals = tuple((aval.shape, aval.dtype) for aval in eqn.in_avals)
    signature = (eqn if eqn.primitive.name == "custom_jvp_call" else eqn.primitive, avals, active)
    others = _under_way.get()
    grows = any(who is signature[0] and len(avals) > len(other) for who, other, _ in others)
    if signature in others or grows:
        raise MissingRule(
            eqn.primitive,
            eqn.source,
            " or a jax.custom_vjp around its call (none can be derived, since its forward-mode "
            "rule uses the primitive itself, and it has no transpose)",
        )
    before = _under_way.set((*others, signature))
    try:
        yield
    finally:
        _under_way.reset(before)


_under_way: contextvars.ContextVar[tuple] = contextvars.ContextVar("under way", default=())


class Derived(Rule):
    """Any primitive with a forward-mode rule, and every `custom_jvp` function."""

    def forward(self, rules, eqn, active, values):
        split = _split(eqn, rules, active)
        unknown = [None] * sum(active)
        results = evaluate(program_of(split.forward), [*values, *unknown])
        n = len(eqn.outputs)
        return results[:n], split.gather(values, results[:n], results[n:])

    def pullback(self, rules, eqn, active, kept, cts):
        carries = [is_inexact(aval) for aval in eqn.out_avals]
        moving = [ct for ct, c in zip(cts, carries, strict=True) if c]
        half = _split(eqn, rules, active).backward((*(False,) * len(cts), *nonzero(moving)))
        values = [*kept, *(ct for ct in moving if ct is not None)]
        found = spread(evaluate(program_of(half.jaxpr), values), half.reached)
        return spread(found[len(eqn.inputs) :], active)


class Transposed(Rule):
    """A primitive of another library among tangents: transposed by the rule of its author."""

    def forward(self, rules, eqn, active, values):
        return eqn.bind(*values), [None if a else v for v, a in zip(values, active, strict=True)]

    def pullback(self, rules, eqn, active, kept, cts):
        return transpose(eqn, active, kept, cts)


register("custom_jvp_call", Derived())
LINEAR[primitive("custom_jvp_call")] = Inline()  # among tangents, a linear function is itself
DERIVED.append(Derived())
TRANSPOSED.append(Transposed())
