"""Loops: `scan` in both directions, and `while`, which has no reverse."""

from __future__ import annotations

from jax import lax

from fbackprop.passes import activity
from fbackprop.program import (
    Program,
    evaluate,
    memoized,
    program_of,
    scan_counts,
    while_counts,
    zeros,
)
from fbackprop.split import Split, nonzero, spread
from fbackprop.table import Rule, Rules, register


@memoized
def _body_activity(body: Program, rules: Rules, active, n_consts: int, n_carry: int):
    """Active inputs of a loop's body once activity has gone round: a fixed point on the carry."""
    consts, carry, xs = _groups(active, n_consts, n_carry)
    while True:
        inputs = (*consts, *carry, *xs)
        outs = activity(body, rules, inputs).outputs
        grown = tuple(a or b for a, b in zip(carry, outs, strict=False))
        if grown == carry:
            return inputs, (*carry, *outs[n_carry:])  # no iteration passes the carry through
        carry = grown


@memoized
def _split(body: Program, rules: Rules, active, n_consts: int, n_carry: int) -> Split:
    """Loop constants and the stacked inputs and outputs are there already; the carry is not."""
    n_xs, n_ys = len(body.inputs) - n_consts - n_carry, len(body.outputs) - n_carry
    return Split(
        rules,
        body,
        active,
        free_inputs=(True,) * n_consts + (False,) * n_carry + (True,) * n_xs,
        free_outputs=(False,) * n_carry + (True,) * n_ys,
        invariant_inputs=(True,) * n_consts + (False,) * (n_carry + n_xs),
    )


def _groups(values, n_consts, n_carry):
    values = tuple(values)
    n = n_consts + n_carry
    return values[:n_consts], values[n_consts:n], values[n:]


class Scan(Rule):
    """A scan is a scan forward, which stacks what its body keeps, and a scan back over that.

    The cotangents of loop constants are summed in the carry of the backward scan.
    """

    def _split(self, rules, eqn, active) -> Split:
        body = program_of(eqn.params["jaxpr"])
        counts = scan_counts(eqn.params)
        return _split(body, rules, _body_activity(body, rules, active, *counts)[0], *counts)

    def active_outputs(self, rules, eqn, active):
        body = program_of(eqn.params["jaxpr"])
        return _body_activity(body, rules, active, *scan_counts(eqn.params))[1]

    def forward(self, rules, eqn, active, values):
        split = self._split(rules, eqn, active)
        n_consts, n_carry = scan_counts(eqn.params)
        n = len(eqn.outputs)
        if split.as_it_stands:
            results = eqn.bind(*values)
        else:
            consts, carry, xs = _groups(values, n_consts, n_carry)

            def step(carry, xs):
                results = evaluate(program_of(split.forward), [*consts, *carry, *xs])
                return tuple(results[:n_carry]), tuple(results[n_carry:])

            last, stacked = lax.scan(step, carry, xs, **_options(eqn, eqn.params["reverse"]))
            results = [*last, *stacked]
        return results[:n], split.gather(values, results[:n], results[n:])

    def pullback(self, rules, eqn, active, kept, cts):
        split = self._split(rules, eqn, active)
        n_consts, n_carry = scan_counts(eqn.params)
        _, live_carry, _ = _groups(split.active, n_consts, n_carry)
        half = split.backward((*live_carry, *nonzero(cts[n_carry:])))
        consts_reached, _, xs_reached = _groups(half.reached, n_consts, n_carry)
        const_avals, carry_avals, _ = _groups(split.program.in_avals, n_consts, n_carry)

        fixed = [
            place == "invariant" or (place == "input" and i < n_consts) for place, i in split.places
        ]
        constants = [k for k, f in zip(kept, fixed, strict=True) if f]
        stacked = [k for k, f in zip(kept, fixed, strict=True) if not f]

        def step(carry, xs):
            carry_cts, sums = carry
            stacked, ys_cts = xs
            pieces = iter(stacked), iter(constants)
            values = [next(pieces[f]) for f in fixed]
            found = evaluate(program_of(half.jaxpr), [*values, *carry_cts, *ys_cts])
            consts_ct, carry_ct, xs_ct = _groups(spread(found, half.reached), n_consts, n_carry)
            carry_ct = [
                zeros(aval) if ct is None else ct
                for ct, aval, a in zip(carry_ct, carry_avals, live_carry, strict=True)
                if a
            ]
            new = [ct for ct in consts_ct if ct is not None]
            sums = [lax.add(s, ct) for s, ct in zip(sums, new, strict=True)]
            return (carry_ct, sums), [ct for ct in xs_ct if ct is not None]

        start = [
            zeros(aval) if ct is None else ct
            for ct, aval, a in zip(cts, carry_avals, live_carry, strict=False)
            if a
        ]
        sums = [zeros(aval) for aval, r in zip(const_avals, consts_reached, strict=True) if r]
        ys_cts = [ct for ct in cts[n_carry:] if ct is not None]
        (carry_cts, sums), xs_cts = lax.scan(
            step, (start, sums), (stacked, ys_cts), **_options(eqn, not eqn.params["reverse"])
        )
        return [
            *spread(sums, consts_reached),
            *spread(carry_cts, live_carry),
            *spread(xs_cts, xs_reached),
        ]


def _options(eqn, reverse: bool) -> dict:
    options = {"unroll": eqn.params["unroll"], "reverse": reverse}
    length = eqn.params["length"]
    return {**options, "length": length} if isinstance(length, int) else options  # or a symbol


class While(Rule):
    """`while_loop`: runs forward; in reverse it would need to remember every iteration."""

    reversible = False

    def active_outputs(self, rules, eqn, active):
        n_cond, n_body = while_counts(eqn.params)
        body = program_of(eqn.params["body_jaxpr"])
        return _body_activity(body, rules, active[n_cond:], n_body, len(eqn.outputs))[1]

    def forward(self, rules, eqn, active, values):
        return eqn.bind(*values), ()

    def pullback(self, rules, eqn, active, kept, cts):
        raise ValueError(
            "Reverse-mode differentiation does not work for lax.while_loop or lax.fori_loop with "
            f"dynamic start/stop values (here at {eqn.source}): the number of iterations to go "
            "back over is not known. Try using lax.scan, or using fori_loop with static "
            "start/stop."
        )


register("scan", Scan())
register("while", While())
