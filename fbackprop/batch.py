"""One sweep over a batch, many quantities.

`sweep` runs a model of one example under `vmap`, its parameters apart from its data
(`fbackprop.separate`), sends the columns that the quantities ask for back through it, and hands
each quantity the sites. Nothing of size examples × parameters is made unless a quantity makes it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fbackprop.columns import Example
from fbackprop.gradients import Gradients, Source, source_of
from fbackprop.passes import backward, forward
from fbackprop.program import (
    TAP,
    Program,
    as_array,
    cotangent_aval,
    has_value,
    is_inexact,
    trace_tree,
    type_of,
    zeros,
)
from fbackprop.quantities.base import Quantity
from fbackprop.reverse import DEFAULT, STRICT
from fbackprop.separate import Separation, Weight, separate
from fbackprop.sites import site_of, whole


def sweep(
    model: Callable,
    loss: Callable,
    *,
    reduction: str = "mean",
    chunk: int | None = None,
    strict: bool = False,
    **quantities: Quantity,
) -> Callable:
    """The loss of a batch and any quantities of its examples' gradients, by one backward sweep.

    Args:
      model: ``model(params, x)`` to the prediction for ONE example, both any pytrees; it may take
        further inputs of the example after `x`, and a random `key` by that name.
      loss: ``loss(prediction, y)`` of one example, a scalar.
      reduction: "mean" (Σ wₙ ℓₙ / Σ wₙ) or "sum" (Σ wₙ ℓₙ) over examples, for the loss, the
        gradient and the curvature.
      chunk: how many examples to go through at a time; None for all. Same results, less memory.
      strict: refuse primitives without a hand-written rule instead of deriving one.
      **quantities: what to compute, by the names under which to return it.

    Returns:
      ``sweep(params, (inputs, targets), *further, weights=None, key=None)``: a dict of the "loss"
      and the quantities. Inputs, targets, further inputs and the `weights` of examples, shape (N,),
      have a leading axis of N examples. The key is for the model, if it takes one, and for
      quantities that sample. It may be jit-ted, and mapped over by `vmap`.

    Raises:
      ValueError: for a batch whose leading axes differ, a loss that is no scalar, a quantity named
        "loss", or a missing key.
      TypeError: for what is no quantity, or parameters that are not real arrays.

    Example:
      >>> import jax.numpy as jnp, fbackprop as fb
      >>> def model(w, x):
      ...     return w @ x
      >>> norms = fb.sweep(model, fb.losses.squared_error, norms=fb.ExampleNorms())
      >>> batch = jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([[0.0], [0.0]])
      >>> [x.item() for x in norms(jnp.array([[1.0, 1.0]]), batch)["norms"]]
      [45.0, 1.0]
    """
    for role, function in (("model", model), ("loss", loss)):
        if not callable(function):
            raise TypeError(f"the {role} must be a function, but it is {function!r}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", but it is {reduction!r}')
    if chunk is not None and not (isinstance(chunk, int) and chunk > 0):
        raise ValueError(f"chunk={chunk}: give a whole number of examples, at least one")
    for name, quantity in quantities.items():
        if name == "loss":
            raise ValueError('a quantity cannot be named "loss": the loss has that name')
        if not isinstance(quantity, Quantity):
            raise TypeError(
                f"{name}={quantity!r} is not a quantity: give an instance of one, like fb.Gradient()"
            )
    takes_key = "key" in _parameters(model)
    rules = STRICT if strict else DEFAULT

    def run(params, batch, *further, weights=None, key=None):
        _check_params(params)
        draws = [name for name, q in quantities.items() if q.needs_key]
        if key is None and (takes_key or draws):
            who = f"the quantity {draws[0]!r} samples" if draws else "the model takes a key"
            raise ValueError(f"{who}: pass key=, a jax.random.key, to the sweep")
        examples = _examples(batch, further, weights, key, takes_key)
        tapped = _tapped(model, takes_key, params, examples.inputs, rules)
        total = 1.0 if reduction == "mean" else _total(weights, len(examples.shares))
        task = _Task(tapped, loss, quantities, params, total)
        others = {
            name: _examples(q.other, (), None, key, takes_key, like=examples.inputs)
            for name, q in quantities.items()
            if q.other is not None
        }
        return task.run(examples, others, chunk)

    return run


class _Examples(NamedTuple):
    """Examples with a leading axis.

    Attributes:
      inputs: of the model, a tuple of pytrees; its key, if it takes one, comes last.
      target: of the loss.
      key: for columns that are drawn.
      shares: (N,), what each example counts in the mean.
    """

    inputs: tuple
    target: Any
    key: Any
    shares: Any


def sites_of(model: Callable, params, inputs: tuple) -> Gradients:
    """The sites of a model on a batch of inputs, for one column of no meaning: to see their shapes."""
    takes_key, n = "key" in _parameters(model), _length(inputs, None)
    if takes_key:
        inputs = (*inputs, jax.random.split(jax.random.key(0), n))

    def column(example: Example):
        return jax.tree.map(lambda z: z[None], example.prediction), jnp.ones(1)

    tapped = _tapped(model, takes_key, params, inputs, DEFAULT)
    task = _Task(tapped, lambda prediction, target: 0.0, {}, params, 1.0)
    _, (swept,) = task.sweep(_Examples(inputs, None, None, jnp.ones(n) / n), [column])
    return task.gradients(swept)


# --- checks ---------------------------------------------------------------------------------------


def _parameters(model) -> Mapping:
    try:
        return inspect.signature(model).parameters
    except (TypeError, ValueError):
        return {}


def _check_params(params):
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path) or "the parameters"
        try:
            aval = type_of(leaf)
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


def _examples(batch, further, weights, key, takes_key: bool, like=None) -> _Examples:
    """A batch, checked; `like` are the inputs of another whose examples it must resemble."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        many = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise ValueError(
            f"a batch must be a pair (inputs, targets), but it is a {type(batch).__name__}{many}"
        )
    x, y = batch
    n = _length((x, y, *further), weights)
    keys = (None, None) if key is None else [jax.random.split(k, n) for k in jax.random.split(key)]
    inputs = (x, *further, keys[0]) if takes_key else (x, *further)
    if like is not None and _example(inputs) != _example(like):
        raise ValueError(
            f"an example of the second batch is {_example(inputs)}, but one of the batch is "
            f"{_example(like)}: both must be of the same shapes"
        )
    weights = jnp.ones(n) if weights is None else jnp.asarray(weights, float)
    return _Examples(inputs, y, keys[1], weights / jnp.sum(weights))


def _example(inputs):
    """The types of one example's inputs."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], type_of(x).dtype), inputs)


def _total(weights, n: int):
    return float(n) if weights is None else jnp.sum(jnp.asarray(weights, float))


def _length(trees, weights) -> int:
    """N, the length of every leading axis."""
    sizes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        shape = jnp.shape(leaf)
        k = path[0].idx
        name = ("inputs", "targets")[k] if k < 2 else f"further inputs {k - 1}"
        name += jax.tree_util.keystr(path[1:])
        if not shape:
            raise ValueError(f"the {name} have no axis of examples: they are a scalar")
        sizes[name] = shape[0]
    if weights is not None:
        _check_weights(weights)
        sizes["weights"] = jnp.shape(weights)[0]
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise ValueError(f"the leading axes of a batch must be of one length, but are {said}")
    if not sizes or 0 in sizes.values():
        raise ValueError("the batch is empty: it must hold at least one example")
    return next(iter(sizes.values()))


def _check_weights(weights) -> None:
    if jnp.ndim(weights) != 1:
        raise ValueError(f"weights must have shape (N,), but have {jnp.shape(weights)}")
    if has_value(weights):
        if np.any(np.asarray(weights) < 0):
            raise ValueError("weights must not be negative: an example counts as much as it weighs")
        if not np.any(np.asarray(weights)):
            raise ValueError("all weights are zero: at least one example must count")


def _leaves(params) -> list:
    return [as_array(x) for x in jax.tree.leaves(params)]


# --- the model with taps --------------------------------------------------------------------------


class Tapped(NamedTuple):
    """A model of one example, ready to be swept.

    Attributes:
      part: the model, its parameters apart from its data.
      source: how its weights come from the parameters.
      program: weights, leaves of the data and nudges, to the prediction's leaves and what the
        weights met.
      structure: of the prediction.
    """

    part: Separation
    source: Source
    program: Program
    structure: Any

    def nudges(self) -> list:
        """One of zeros for each use, and then for each weight used without structure."""
        n = len(self.part.uses) + sum(map(bool, self.part.loose))
        return [zeros(aval) for aval in self.program.in_avals[len(self.program.inputs) - n :]]


def _tapped(model, takes_key, params, inputs, rules) -> Tapped:
    """Trace a model for one of the examples whose batch is `inputs`."""

    def call(params, x, *further):
        if takes_key:
            *further, key = further
            return model(params, x, *further, key=key)
        return model(params, x, *further)

    program, structure = trace_tree(call, params, *_example(inputs))
    return tap(program, structure, len(jax.tree.leaves(params)), rules)


def tap(program: Program, structure, n_params: int, rules) -> Tapped:
    """A program whose first inputs are the parameters, separated and tapped."""
    n_data = len(program.inputs) - n_params
    moving = tuple(map(is_inexact, program.in_avals[:n_params])) + (False,) * n_data
    part = separate(program, rules, moving, (False,) * n_params + (True,) * n_data)
    source = source_of(part, n_params)

    def run(weights, fixed, data, at_uses, at_weights):
        pieces = iter(at_weights)
        weights = [
            Weight(w, TAP.bind(w, next(pieces)) if loose else w)
            for w, loose in zip(weights, part.loose, strict=True)
        ]
        values = [x if not m else None for x, m in zip(fixed, moving, strict=False)]
        return part.meet(weights, [*values, *data], at_uses)

    avals = source.program.out_avals
    tapped, _ = trace_tree(
        run,
        list(avals),
        list(program.in_avals[:n_params]),
        list(program.in_avals[n_params:]),
        [_nudge(use.eqn.out_avals[0], use.nudge_shape) for use in part.uses],
        [_nudge(a, a.shape) for a, loose in zip(avals, part.loose, strict=True) if loose],
    )
    return Tapped(part, source, tapped, structure)


def _nudge(aval, shape):
    return jax.ShapeDtypeStruct(shape, cotangent_aval(aval).dtype)


# --- the sweep ------------------------------------------------------------------------------------


class _Swept(NamedTuple):
    """What one kind of columns leaves of each example.

    Attributes:
      met: for each use what the weight met there.
      signals: for each nudge its cotangent, (C, *nudge), None where nothing arrived.
      signs: (C,).
      shares: the example's share in the mean.
    """

    met: list
    signals: list
    signs: Any
    shares: Any


class _Task(NamedTuple):
    """What to compute of examples."""

    tapped: Tapped
    loss: Callable
    quantities: Mapping[str, Quantity]
    params: Any
    scale: Any

    def run(self, examples: _Examples, others: Mapping[str, _Examples], chunk: int | None) -> dict:
        """All of it.

        Args:
          examples: of the batch.
          others: of a second batch, for each quantity that has one.
          chunk: how many examples to go through at a time, None for all.
        """
        found = self._in_chunks(examples, chunk) if chunk else self._piece(examples)
        found["loss"] = found["loss"] * self.scale
        for name, quantity in self.quantities.items():
            x = found[name]
            if quantity.over == "pairs":
                gradients = self.gradients(x)
                if name in others:
                    (swept,) = self.sweep(others[name], [quantity.columns])[1]
                    gradients.second = self.gradients(swept)
                x = quantity.extract(gradients)
            found[name] = quantity.finish(quantity.scaled(x, self.scale))
        return found

    def _piece(self, examples: _Examples) -> dict:
        """The loss and what each quantity extracts from these examples."""
        kinds = list(dict.fromkeys(q.columns for q in self.quantities.values()))
        losses, swept = self.sweep(examples, kinds)
        swept = dict(zip(kinds, swept, strict=True))
        gradients = {kind: self.gradients(s) for kind, s in swept.items()}
        found = {"loss": jnp.sum(losses * examples.shares.astype(losses.dtype))}
        for name, q in self.quantities.items():
            whole_batch = q.over == "pairs"
            found[name] = swept[q.columns] if whole_batch else q.extract(gradients[q.columns])
        return found

    def sweep(self, examples: _Examples, kinds: Sequence) -> tuple[Any, list[_Swept]]:
        """The examples' losses, and what each kind of columns leaves of them."""
        tapped = self.tapped
        rules, program, n = tapped.part.rules, tapped.program, tapped.structure.num_leaves
        params = _leaves(self.params)
        weights, nudges = tapped.source.weights(params), tapped.nudges()
        first = len(program.inputs) - len(nudges)
        active = tuple(i >= first for i in range(len(program.inputs)))

        def one(inputs, target, key, share):
            data = jax.tree.leaves(inputs)
            outs, tape = forward(rules, program, active, [*weights, *params, *data, *nudges])
            prediction = jax.tree.unflatten(tapped.structure, outs[:n])
            loss = self.loss(prediction, target)
            _check_loss(loss)

            def back(seed):
                cts = [ct if is_inexact(type_of(ct)) else None for ct in jax.tree.leaves(seed)]
                cts += [None] * (len(outs) - n)
                return backward(rules, program, active, tape, cts)[first:]

            swept = []
            for kind in kinds:
                seeds, signs = kind(Example(self.loss, prediction, target, key))
                if signs.shape == (1,):
                    signals = back(jax.tree.map(lambda x: x[0], seeds))
                    signals = [s if s is None else s[None] for s in signals]
                else:
                    signals = jax.vmap(back)(seeds)
                swept.append(_Swept(outs[n:], signals, signs, share))
            return loss, swept

        return jax.vmap(one)(*examples)

    def gradients(self, swept: _Swept) -> Gradients:
        part, source = self.tapped.part, self.tapped.source
        shapes = [aval.shape for aval in source.program.out_avals]
        n = len(part.uses)
        sites = [
            (use.weight, site_of(use, met, signals, shapes[use.weight]))
            for use, met, signals in zip(part.uses, swept.met, swept.signals[:n], strict=True)
            if signals is not None
        ]
        nudged = [i for i, loose in enumerate(part.loose) if loose]
        for i, signals in zip(nudged, swept.signals[n:], strict=True):
            if signals is not None:
                sites.append((i, whole(signals)))
        return Gradients(source, part.program, self.params, sites, swept.shares, swept.signs)

    def _in_chunks(self, examples: _Examples, chunk: int) -> dict:
        """The same piece by piece: what is of examples in a row, what is a sum summed."""
        chunk = min(chunk, len(examples.shares))
        full, rest = divmod(len(examples.shares), chunk)
        pieces = []
        if full:
            stacked = jax.tree.map(
                lambda x: x[: full * chunk].reshape(full, chunk, *x.shape[1:]), examples
            )

            def step(sums, piece):
                new, each = self._divided(self._piece(piece))
                return jax.tree.map(jnp.add, sums, new), each

            first = jax.tree.map(lambda x: x[0], stacked)
            shapes, _ = jax.eval_shape(lambda e: self._divided(self._piece(e)), first)
            start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            sums, each = lax.scan(step, start, stacked)
            pieces.append((sums, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), each)))
        if rest:
            last = jax.tree.map(lambda x: x[full * chunk :], examples)
            pieces.append(self._divided(self._piece(last)))
        sums = jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *(piece[0] for piece in pieces))
        each = jax.tree.map(lambda *xs: jnp.concatenate(xs), *(piece[1] for piece in pieces))
        return {**sums, **each}

    def _divided(self, found: dict) -> tuple[dict, dict]:
        sums = {"loss", *(name for name, q in self.quantities.items() if q.over == "sum")}
        return (
            {name: x for name, x in found.items() if name in sums},
            {name: x for name, x in found.items() if name not in sums},
        )


def _check_loss(loss) -> None:
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise ValueError(
            f"the loss of one example must be a real scalar, but it has shape {jnp.shape(loss)} and "
            f"dtype {jnp.result_type(loss)}: sum it over the prediction's axes"
        )
