"""Equations that hold a program, run with another in its place: one that takes and returns more."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
from jax import lax

from fbackprop.program import Equation, evaluate, program_of, scan_counts


def scan_body(
    eqn: Equation, jaxpr, operands: Sequence, *, fixed: Sequence = (), each: Sequence = ()
) -> list:
    """Run a scan with another body.

    Args:
      eqn: the scan.
      jaxpr: of operands, fixed and each, to the results of an iteration and further ones, which
        come stacked.
      operands: of the scan.
      fixed: further constants of the loop.
      each: further arrays with a slice for each iteration.
    """
    n_consts, n_carry = scan_counts(eqn.params)
    n = n_consts + n_carry
    consts, carry, xs = operands[:n_consts], operands[n_consts:n], operands[n:]
    n_xs = len(xs)

    def step(carry, xs):
        values = [*consts, *carry, *xs[:n_xs], *fixed, *xs[n_xs:]]
        found = evaluate(program_of(jaxpr), values)
        return tuple(found[:n_carry]), tuple(found[n_carry:])

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    last, stacked = lax.scan(step, tuple(carry), (*xs, *each), **options)
    return [*last, *stacked]


def checkpoint_body(eqn: Equation, jaxpr, values: Sequence) -> list:
    """Run a checkpointed call with another body, checkpointed likewise."""
    run = functools.partial(evaluate, program_of(jaxpr))
    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(lambda *values: run(values), **options)(*values)
