"""Collectives: sums over the devices of a mesh axis, under `shard_map`.

A value is the same on all devices of an axis or varies over it. To make it vary and to sum it up
are transposes of each other: the cotangent of a shared value is the sum over those who used it.
"""

from __future__ import annotations

from fbackprop.program import primitive
from fbackprop.table import row

row(
    "pvary",
    lambda ct, eqn: primitive("psum_invariant").bind(ct, axes=eqn.params["axes"]),
)
row("psum_invariant", lambda ct, eqn: primitive("pvary").bind(ct, axes=eqn.params["axes"]))
