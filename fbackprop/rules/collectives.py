"""Collectives: sums and exchanges between the devices of a mesh axis, under `shard_map`.

A value is the same on all devices of an axis or varies over it. To make it vary and to sum it up
are transposes of each other: the cotangent of a shared value is the sum over those who used it.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from jax import lax

from fbackprop.passes import activity, pull
from fbackprop.program import primitive, program_of, sharding_of, zeros
from fbackprop.split import nonzero, spread
from fbackprop.table import Rule, joint, register, row


def _transposes(first: str, second: str) -> None:
    """Rows of two primitives over the same axes, each the other's transpose."""

    def enter(mine, other):
        row(mine, lambda ct, eqn: primitive(other).bind(ct, axes=eqn.params["axes"]))

    enter(first, second)
    enter(second, first)


_transposes("pvary", "psum_invariant")
_transposes("unreduced_psum", "preduced")
_transposes("vary_unreduced_cast", "reduced_vary_cast")
_transposes("vary_unreduced_cast_p", "reduced_vary_cast_p")  # their names before JAX 0.12


@joint("psum")
def _psum(ct, eqn):
    """Where devices are not tracked, each holds a part of the sum's cotangent: sum the parts.

    `vmap` turns names into positions: along those the cotangent is stretched.
    """
    shape, axes = eqn.in_avals[0].shape, eqn.params["axes"]
    positions = [a for a in axes if isinstance(a, int)]
    names = tuple(a for a in axes if not isinstance(a, int))
    if names:
        ct = eqn.primitive.bind(ct, **{**eqn.params, "axes": names})
    return lax.broadcast_in_dim(ct, shape, [d for d in range(len(shape)) if d not in positions])


def _options(eqn, *names) -> dict:
    return {name: eqn.params[name] for name in names if name in eqn.params}


@joint("reshard")
def _reshard(ct, eqn):
    """Back to where the operand lay on an explicit mesh."""
    return jax.sharding.reshard(ct, sharding_of(eqn.in_avals[0]))


@joint("all_gather")
def _all_gather(ct, eqn):
    options = _options(eqn, "axis_name", "axis_index_groups", "tiled")
    return lax.psum_scatter(ct, scatter_dimension=eqn.params["all_gather_dimension"], **options)


@joint("reduce_scatter")
def _reduce_scatter(ct, eqn):
    options = _options(eqn, "axis_name", "axis_index_groups", "tiled")
    return lax.all_gather(ct, axis=eqn.params["scatter_dimension"], **options)


@joint("all_gather_reduced")
def _all_gather_reduced(ct, eqn):
    options = _options(eqn, "axis_name", "axis_size", "tiled")
    axis = eqn.params["all_gather_dimension"]
    return primitive("unreduced_reduce_scatter").bind(ct, scatter_dimension=axis, **options)


@joint("unreduced_reduce_scatter")
def _unreduced_reduce_scatter(ct, eqn):
    options = _options(eqn, "axis_name", "axis_size", "tiled")
    axis = eqn.params["scatter_dimension"]
    return primitive("all_gather_reduced").bind(ct, all_gather_dimension=axis, **options)


@joint("all_gather_invariant")
def _all_gather_invariant(ct, eqn):
    """Every device takes its own piece of the cotangent that all of them share."""
    axis, shape = eqn.params["all_gather_dimension"], eqn.in_avals[0].shape
    size = ct.shape[axis] // eqn.params["axis_size"]
    start = lax.mul(lax.axis_index(eqn.params["axis_name"]), np.int32(size))
    return lax.reshape(lax.dynamic_slice_in_dim(ct, start, size, axis), shape)


@joint("all_to_all")
def _all_to_all(ct, eqn):
    options = _options(eqn, "axis_name", "axis_index_groups", "tiled")
    p = eqn.params
    return lax.all_to_all(ct, split_axis=p["concat_axis"], concat_axis=p["split_axis"], **options)


@joint("ppermute")
def _ppermute(ct, eqn):
    back = [(target, source) for source, target in eqn.params["perm"]]
    return lax.ppermute(ct, eqn.params["axis_name"], back)


def _to_source(ct, source, eqn):
    """The device that everyone read from gets the sum of their cotangents."""
    axis = eqn.params["axis_name"]
    is_source = lax.eq(lax.axis_index(axis), lax.convert_element_type(source, np.int32))
    return lax.select(is_source, lax.psum(ct, axis), lax.full_like(ct, 0))


row("pbroadcast", lambda ct, eqn: _to_source(ct, eqn.params["source"], eqn))
row("pbroadcast_dynamic", lambda ct, y, eqn: _to_source(ct, y, eqn), None)


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
            found = pull(rules, program, active, values, spread(arriving, present))
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
