"""A model of one example, made ready for a sweep: its parameters apart, its taps in place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fbackprop.examples import one_of
from fbackprop.gradients import Source, source_of
from fbackprop.program import (
    TAP,
    Program,
    bound,
    cotangent_aval,
    is_inexact,
    program_of,
    shaped,
    trace_tree,
    zeros,
)
from fbackprop.rewrite import Overrides
from fbackprop.separate import Separation, separate
from fbackprop.taps import Plan, is_named, plan
from fbackprop.uses import Weight


class Tapped(NamedTuple):
    """A model of one example, ready to be swept.

    Attributes:
      part: the model, its parameters apart from its data.
      source: how its weights come from the parameters.
      program: weights, leaves of the data and nudges, to the prediction's leaves and what the
        weights met.
      structure: of the prediction.
      n_nudges: how many of the last inputs are nudges: one for each use, then one for each weight
        used without structure, then those of named values.
      names: where values are named, if their error signals are wanted.
    """

    part: Separation
    source: Source
    program: Program
    structure: Any
    n_nudges: int
    names: Plan | None

    def nudges(self) -> list:
        return [
            zeros(aval)
            for aval in self.program.in_avals[len(self.program.inputs) - self.n_nudges :]
        ]


def tapped_model(
    model: Callable,
    params,
    inputs: tuple,
    rules,
    has_key: bool,
    names: bool = False,
    changes: Overrides | None = None,
) -> Tapped:
    """Trace a model for one of the examples whose batch is `inputs`.

    Args:
      model, params, inputs, rules: as their names say.
      has_key: whether the last of the inputs is the model's key.
      names: whether error signals of named values are wanted.
      changes: other backward rules.
    """

    def call(params, *inputs):
        return call_model(model, params, inputs, has_key)

    program, structure = trace_tree(call, params, *one_of(inputs))
    if changes is not None:
        program, arrays = changes.applied(program, 0, params)
        program = bound(program, arrays)
    return _tap(program, structure, len(jax.tree.leaves(params)), rules, names)


def _tap(program: Program, structure, n_params: int, rules, names: bool) -> Tapped:
    """A program whose first inputs are the parameters, separated and tapped."""
    n_data = len(program.inputs) - n_params
    moving = tuple(map(is_inexact, program.in_avals[:n_params])) + (False,) * n_data
    part = separate(program, rules, moving, (False,) * n_params + (True,) * n_data)
    source = source_of(part, n_params)

    def run(weights, fixed, data, at_uses, at_weights):
        pieces = iter(at_weights)
        both = [
            Weight(w, TAP.bind(w, next(pieces)) if loose else w)
            for w, loose in zip(weights, part.loose, strict=True)
        ]
        values = [x if not m else None for x, m in zip(fixed, moving, strict=False)]
        return part.meet(both, [*values, *data], at_uses)

    avals = source.program.out_avals
    tapped, _ = trace_tree(
        run,
        list(avals),
        list(program.in_avals[:n_params]),
        list(program.in_avals[n_params:]),
        [_nudge(use.eqn.out_avals[0], use.nudge_shape) for use in part.uses],
        [_nudge(a, a.shape) for a, loose in zip(avals, part.loose, strict=True) if loose],
    )
    n = part.n_taps
    if not names:
        return Tapped(part, source, tapped, structure, n, None)
    active = tuple(i >= len(tapped.inputs) - n for i in range(len(tapped.inputs)))
    plan_of_names = plan(tapped, rules, active, is_named)
    with_names = program_of(plan_of_names.traced[0])
    n += len(with_names.inputs) - len(tapped.inputs)
    return Tapped(part, source, with_names, structure, n, plan_of_names)


def _nudge(aval, shape):
    return jax.ShapeDtypeStruct(shape, cotangent_aval(aval).dtype)


# --- what a user passes ---------------------------------------------------------------------------


def call_model(model: Callable, params, inputs: Sequence, has_key: bool):
    """The prediction for one example; the last of its inputs is the model's key, if it has one."""
    if not has_key:
        return model(params, *inputs)
    *others, key = inputs
    named = list(inspect.signature(model).parameters.values())
    before = [p for p in named if p.kind is not p.KEYWORD_ONLY][: 1 + len(others)]
    if any(p.name == "key" for p in before):
        raise TypeError(
            "the model takes its key before its inputs: give a function that takes it after them, "
            "lambda params, x, key: …"
        )
    return model(params, *others, key=key)


def takes_key(model) -> bool:
    """Whether a model has a parameter called key."""
    return _key_of(model) is not None


def needs_key(model) -> bool:
    """Whether a model has a parameter called key, without a default."""
    key = _key_of(model)
    return key is not None and key.default is inspect.Parameter.empty


def _key_of(model) -> inspect.Parameter | None:
    try:
        return inspect.signature(model).parameters.get("key")
    except (TypeError, ValueError):  # what Python cannot look into has none
        return None


def check_params(params):
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path) or "the parameter"
        try:
            aval = shaped(leaf)
        except TypeError:
            raise TypeError(
                f"{name} is no array but {leaf!r}: pass only arrays as parameters, and close over "
                "the rest"
            ) from None
        if jnp.issubdtype(aval.dtype, jnp.complexfloating):
            raise TypeError(f"{name} is complex: the quantities of a sweep are for real parameters")
        if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
            raise TypeError(
                f"{name} is of dtype {aval.dtype}: pass only arrays of numbers as parameters, and "
                "close over the rest"
            )
