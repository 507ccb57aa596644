"""Collectives: sums over the devices of a mesh axis, under `shard_map`.

A value is the same on all devices of an axis or varies over it. To make it vary and to sum it up
are transposes of each other: the cotangent of a shared value is the sum over those who used it.
"""

from __future__ import annotations

import math

import jax
from jax import lax

from fbackprop.program import primitive, program_of, zeros
from fbackprop.split import nonzero, spread
from fbackprop.sweep import activity, backward, forward
from fbackprop.table import Rule, register, row

row(
    "pvary",
    lambda ct, eqn: primitive("psum_invariant").bind(ct, axes=eqn.params["axes"]),
)
row("psum_invariant", lambda ct, eqn: primitive("pvary").bind(ct, axes=eqn.params["axes"]))


class ShardMap(Rule):
    """`shard_map` from outside: one `shard_map` back, which runs both passes on each shard.

    What a device computed forward is computed again rather than passed between the two, since a
    shard's intermediate values have no place in the arrays outside.
    """

    def active_outputs(self, rules, eqn, active):
        return activity(program_of(eqn.params["jaxpr"]), rules, active).outputs

    def forward(self, rules, eqn, active, values):
        return eqn.bind(*values), tuple(values)

    def pullback(self, rules, eqn, active, kept, cts):
        p = eqn.params
        program, present = program_of(p["jaxpr"]), nonzero(cts)
        sizes = {name: p["mesh"].shape[name] for name in p["newly_manual_axes"]}

        def shared(spec) -> tuple[str, ...]:
            """The axes over which an array with this spec is not divided."""
            named = jax.tree.leaves(tuple(spec))
            return tuple(name for name in sizes if name not in named)

        def on_each_shard(values, arriving):
            if not p["check_vma"]:  # each device holds the whole of a shared result's cotangent
                arriving = [
                    lax.div(ct, lax.full_like(ct, math.prod(sizes[a] for a in shared(spec))))
                    for ct, spec in zip(arriving, specs_out, strict=True)
                ]
            _, tape = forward(rules, program, active, values)
            found = backward(rules, program, active, tape, spread(arriving, present))
            leaving = []
            for ct, aval, spec, a in zip(
                found, program.in_avals, p["in_specs"], active, strict=True
            ):
                if not a:
                    continue
                ct = zeros(aval) if ct is None else ct
                if not p["check_vma"] and shared(spec):
                    ct = lax.psum(ct, shared(spec))
                leaving.append(ct)
            return leaving

        specs_out = [spec for spec, here in zip(p["out_specs"], present, strict=True) if here]
        sweep = jax.shard_map(
            on_each_shard,
            mesh=p["mesh"],
            in_specs=(list(p["in_specs"]), specs_out),
            out_specs=[spec for spec, a in zip(p["in_specs"], active, strict=True) if a],
            axis_names=set(p["newly_manual_axes"]),
            check_vma=p["check_vma"],
        )
        return spread(sweep(list(kept), [ct for ct in cts if ct is not None]), active)


register("shard_map", ShardMap())
