"""One sweep over a batch, many quantities.

`sweep` runs a model of one example under `vmap`, its parameters apart from its data
(`fbackprop.separate`), sends the columns that the quantities ask for back through it, and hands
each quantity the sites. Nothing of size examples × parameters is made unless a quantity makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fbackprop.columns import Example, hashable, is_count
from fbackprop.examples import Examples, examples_of, length, total_weight
from fbackprop.gradients import Gradients
from fbackprop.model import Tapped, check_params, needs_key, takes_key, tapped_model
from fbackprop.passes import backward, forward
from fbackprop.program import as_array, is_inexact, type_of
from fbackprop.quantities.base import Quantity
from fbackprop.record import named_signals
from fbackprop.reverse import DEFAULT, STRICT
from fbackprop.rewrite import Overrides
from fbackprop.site_rules import site_of
from fbackprop.sites import whole


def sweep(
    model: Callable,
    loss: Callable,
    *,
    reduction: str = "mean",
    chunk: int | None = None,
    strict: bool = False,
    rules: Mapping | None = None,
    **quantities: Quantity,
) -> Callable:
    """The loss of a batch and any quantities of its examples' gradients, by one backward sweep.

    Args:
      model: ``model(params, x)`` to the prediction for ONE example, both any pytrees; it may take
        further inputs of the example after `x`, and a random `key` by that name, which each
        example has of its own.
      loss: ``loss(prediction, y)`` of one example, a scalar.
      reduction: "mean" (Σ wₙ ℓₙ / Σ wₙ) or "sum" (Σ wₙ ℓₙ) over examples, for the loss, the
        gradient and the curvature. What is of single examples, and means over their gradients
        (clipped ones, moments), stay as they are.
      chunk: how many examples to go through at a time; None for all. Same results, less memory.
      strict: refuse primitives without a hand-written rule instead of deriving one.
      rules: other backward rules for the model, as of `vjp`.
      **quantities: what to compute, by the names under which to return it.

    Returns:
      ``sweep(params, (inputs, targets), *further, weights=None, key=None)``: a dict of the "loss"
      and the quantities. Inputs, targets, further inputs and the `weights` of examples, shape (N,),
      have a leading axis of N examples. Weights must not be negative, nor all of them zero for a
      mean, which under `jit` is not a number then. An example of weight zero is gone through as
      well: its numbers must be finite. The key is for the model, if it takes one, and for
      quantities that sample. It may be jit-ted, and mapped over by `vmap`.

    Raises:
      ValueError: for a batch whose leading axes differ, a loss that is no scalar, or a missing key.
      TypeError: for what is no quantity, or parameters that are not real arrays.

    Examples:
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
    if chunk is not None and not is_count(chunk):
        raise ValueError(f"chunk={chunk}: give a whole number of examples, at least one")
    if not isinstance(strict, bool):  # a quantity by that name, perhaps
        raise TypeError(f"strict={strict!r} must be True or False")
    for name, quantity in quantities.items():
        if not isinstance(quantity, Quantity):
            raise TypeError(
                f"{name}={quantity!r} is not a quantity: give an instance, such as fb.Gradient()"
            )
        if quantity.over not in ("sum", "examples", "pairs"):
            raise ValueError(f'{name}: over={quantity.over!r} must be "sum", "examples" or "pairs"')
    table = STRICT if strict else DEFAULT
    changes = None if rules is None else Overrides(rules)

    def run(params, batch, *further, weights=None, key=None):
        check_params(params)
        draws = [name for name, q in quantities.items() if q.needs_key]
        if key is None and (needs_key(model) or draws):
            who = f"the quantity {draws[0]!r} samples" if draws else "the model takes a key"
            raise ValueError(f"{who}: pass key=, a jax.random.key, to the sweep")
        has_key = key is not None and takes_key(model)
        examples = examples_of(batch, further, weights, key, has_key)
        names = any(q.names for q in quantities.values())
        tapped = tapped_model(model, params, examples.inputs, table, has_key, names, changes)
        total = 1.0
        if reduction == "sum":  # over examples that all weigh nothing it is zero, and no mean is
            total = total_weight(weights, len(examples.shares))
            if weights is not None:
                examples = examples._replace(shares=jnp.where(total == 0, 0.0, examples.shares))
        even = 1 / len(examples.shares) if weights is None else None
        kinds = {name: hashable(q.columns) for name, q in quantities.items()}
        task = _Task(tapped, loss, quantities, kinds, params, total, even, set())
        others = {}
        for name, q in quantities.items():
            if q.other is not None:
                second, more = _second_batch(name, q.other)
                others[name] = examples_of(second, more, None, key, has_key, like=examples.inputs)
        return task.run(examples, others, chunk)

    return run


def sites_of(model: Callable, params, inputs: tuple) -> Gradients:
    """The sites of a model on a batch of inputs, for a column of no meaning: to see shapes."""
    n, has_key = length(inputs, None), needs_key(model)
    if has_key:
        inputs = (*inputs, jax.random.split(jax.random.key(0), n))

    def column(example: Example):
        return jax.tree.map(lambda z: z[None], example.of_moving().prediction), None

    tapped = tapped_model(model, params, inputs, DEFAULT, has_key)
    task = _Task(tapped, lambda prediction, target: 0.0, {}, {}, params, 1.0, 1 / n, set())
    _, (swept,) = task.sweep(Examples(inputs, None, None, jnp.ones(n) / n), [column])
    return task.gradients(swept, column)


# --- the sweep ------------------------------------------------------------------------------------


def _second_batch(name: str, other) -> tuple:
    """The batch and the further inputs of a quantity's `other`."""
    if not isinstance(other, tuple | list) or len(other) < 2:
        raise ValueError(f"{name}: other must be a tuple, the inputs and targets of a second batch")
    return other[:2], other[2:]


def _leaves(params) -> list:
    return [as_array(x) for x in jax.tree.leaves(params)]


class _Swept(NamedTuple):
    """What one kind of columns leaves of each example.

    Attributes:
      met: for each use what the weight met there.
      signals: for each use and each nudged weight its cotangent, (C, *nudge), None where nothing
        arrived.
      named: error signals of named values, (C, *value).
      signs: (C,).
      shares: the example's share in the mean.
    """

    met: list
    signals: list
    named: dict
    signs: Any
    shares: Any


class _Task(NamedTuple):
    """What to compute of examples.

    Attributes:
      tapped, loss, quantities, params: as their names say.
      kinds: of each quantity its columns.
      scale: what the batch's loss is, as a multiple of the mean.
      even: each example's share in the mean if all have the same, else None.
      signed: the kinds of columns of which some have a negative sign, noted while tracing.
    """

    tapped: Tapped
    loss: Callable
    quantities: Mapping[str, Quantity]
    kinds: Mapping[str, Callable]
    params: Any
    scale: Any
    even: float | None
    signed: set

    def run(self, examples: Examples, others: Mapping[str, Examples], chunk: int | None) -> dict:
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
                kind = self.kinds[name]
                gradients = self.gradients(x, kind)
                if name in others:
                    (swept,) = self.sweep(others[name], [kind])[1]
                    gradients.second = self.gradients(swept, kind)
                x = quantity.extract(gradients)
                _check_arrays(name, x)
            found[name] = quantity.finish(quantity.scaled(x, self.scale))
        return found

    def _piece(self, examples: Examples) -> dict:
        """The loss and what each quantity extracts from these examples."""
        kinds = list(dict.fromkeys(self.kinds.values()))
        losses, found_of_kinds = self.sweep(examples, kinds)
        swept = dict(zip(kinds, found_of_kinds, strict=True))
        gradients = {kind: self.gradients(s, kind) for kind, s in swept.items()}
        found = {"loss": jnp.sum(losses * examples.shares.astype(losses.dtype))}
        for name, q in self.quantities.items():
            kind = self.kinds[name]
            if q.over == "pairs":
                found[name] = swept[kind]
                continue
            found[name] = q.extract(gradients[kind])
            _check_arrays(name, found[name])
            if q.over == "examples":
                _check_rows(name, found[name], len(losses))
        return found

    def sweep(self, examples: Examples, kinds: Sequence) -> tuple[Any, list[_Swept]]:
        """The examples' losses, and what each kind of columns leaves of them."""
        tapped = self.tapped
        rules, program, n = tapped.part.rules, tapped.program, tapped.structure.num_leaves
        n_uses, n_taps = len(tapped.part.uses), tapped.part.n_taps
        params = _leaves(self.params)
        weights, nudges = tapped.source.weights(params), tapped.nudges()
        first = len(program.inputs) - len(nudges)
        active = tuple(i >= first for i in range(len(program.inputs)))

        def one(inputs, target, key, share):
            data = jax.tree.leaves(inputs)
            outs, tape = forward(rules, program, active, [*weights, *params, *data, *nudges])
            met, notes = outs[n : n + n_uses], outs[n + n_uses :]
            prediction = jax.tree.unflatten(tapped.structure, outs[:n])
            loss = self.loss(prediction, target)
            _check_loss(loss)

            def back(column):
                moving = iter(column)
                cts = [next(moving) if is_inexact(type_of(z)) else None for z in outs[:n]]
                cts += [None] * (len(outs) - n)
                signals = backward(rules, program, active, tape, cts)[first:]
                if tapped.names is None:
                    return signals, {}
                return signals[:n_taps], named_signals(tapped.names, notes, signals[n_taps:])

            swept = []
            example = Example(self.loss, prediction, target, key)
            for kind in kinds:
                leaves, signs = _checked(kind(example), prediction)
                n_columns = len(leaves[0])
                if signs is None:
                    signs = jnp.ones(n_columns)
                else:
                    self.signed.add(kind)
                if n_columns == 1:
                    found = jax.tree.map(lambda x: x[None], back([x[0] for x in leaves]))
                else:
                    found = jax.vmap(back)(leaves)
                signals, named = found
                swept.append(_Swept(met, signals, named, signs, share))
            return loss, swept

        return jax.vmap(one)(*examples)

    def gradients(self, swept: _Swept, kind) -> Gradients:
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
        even = None if kind in self.signed else self.even
        shares, signs, named = swept.shares, swept.signs, swept.named
        return Gradients(source, part.program, self.params, sites, shares, signs, even, named)

    def _in_chunks(self, examples: Examples, chunk: int) -> dict:
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
            rows = jax.tree.map(lambda x: x.reshape(full * chunk, *x.shape[2:]), each)
            pieces.append((sums, rows))
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


def _checked(columns, prediction) -> tuple[list, Any]:
    """The leaves of columns, one for each of the prediction's that have derivatives; the signs."""
    moving = [type_of(z) for z in jax.tree.leaves(prediction) if is_inexact(type_of(z))]
    if not moving:
        raise TypeError(
            "the prediction has no floating-point array in it: nothing that depends on the "
            f"parameters has a derivative, but {jax.tree.map(type_of, prediction)}"
        )
    if not isinstance(columns, tuple) or len(columns) != 2:
        raise TypeError(
            f"a quantity's columns must be a pair (columns, signs), but are a "
            f"{type(columns).__name__}: return None for the signs where all are positive"
        )
    leaves, signs = jax.tree.leaves(columns[0]), columns[1]
    shapes, expected = list(map(jnp.shape, leaves)), [z.shape for z in moving]
    if [shape[1:] for shape in shapes] != expected or len({shape[:1] for shape in shapes}) > 1:
        raise ValueError(
            f"a quantity's columns must be like the prediction, {expected}, each with the axis of "
            f"columns in front, but are {shapes}"
        )
    if signs is not None and jnp.shape(signs) != shapes[0][:1]:
        raise ValueError(
            f"the signs of {shapes[0][0]} columns must have shape {shapes[0][:1]}, but have "
            f"{jnp.shape(signs)}"
        )
    pairs = zip(leaves, moving, strict=True)
    return [jnp.asarray(x).astype(z.dtype) for x, z in pairs], signs


def _check_arrays(name: str, found) -> None:
    for x in jax.tree.leaves(found):
        if not isinstance(x, jax.Array | np.ndarray | np.generic | float | int | complex):
            raise TypeError(
                f"{name}: a quantity extracts a pytree of arrays, but there is a "
                f"{type(x).__name__} in it"
            )


def _check_rows(name: str, found, n: int) -> None:
    for shape in map(jnp.shape, jax.tree.leaves(found)):
        if shape[:1] != (n,):
            raise ValueError(
                f'{name}: a quantity over "examples" must have a leading axis of {n} examples, '
                f"but it extracted an array of shape {shape}"
            )


def _check_loss(loss) -> None:
    if jax.tree.structure(loss) != jax.tree.structure(0):
        raise TypeError(
            f"the loss of one example must be a real scalar, but is a {type(loss).__name__}: "
            "return no more than the loss"
        )
    shape, dtype = jnp.shape(loss), jnp.result_type(loss)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        remedy = "sum it over the prediction's axes" if shape else "return a floating-point number"
        raise ValueError(
            f"the loss of one example must be a real scalar, but has shape {shape} and dtype "
            f"{dtype}: {remedy}"
        )
