"""Training with one setting from one seed: a pure function, to be compiled and mapped.

Everything random follows from the seed: the initial parameters, the order of the examples, the
keys of the optimizer. They are drawn beforehand, by a program that all optimizers share. What
counts steps is the same number in all lanes of a ``vmap`` over settings and seeds, so that whatever
an optimizer does every so many steps stays a branch there.

Index legend: N examples, B examples in a batch, R records.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback

from experiments.optimizers import Optimizer, Setting
from experiments.tasks import Params, Task
from fbackprop import optim

Data: TypeAlias = tuple[jax.Array, jax.Array]
Batches: TypeAlias = Callable[[Any], Data]

EVALUATED_AT_ONCE = 256  # examples; all of them times all lanes would not fit into memory


class Schedule(NamedTuple):
    """How many examples a step sees, and after which steps there is a record; 0 is the first."""

    batch_size: int
    stops: tuple[int, ...]

    @property
    def steps(self) -> int:
        """How many steps there are in all."""
        return self.stops[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """The data: a pytree, its numbers of examples static.

    ``measured`` holds those examples whose losses are recorded, first ``seen`` of the training
    part, then ``tested`` of the test part, then copies of the last, which make up whole chunks.
    """

    train: Data
    measured: Data
    seen: int = dataclasses.field(metadata={"static": True})
    tested: int = dataclasses.field(metadata={"static": True})
    chunk: int = dataclasses.field(metadata={"static": True})


class Start(NamedTuple):
    """What follows from a seed: parameters, shuffles of the examples in a row, the steps' key."""

    params: Params
    order: jax.Array
    key: jax.Array


class Curve(NamedTuple):
    """Mean loss of the training part, mean loss and score of the test part, each of shape (R,).

    NaN where there is no test part, and after training was called off.
    """

    train_loss: Any
    test_loss: Any
    test_score: Any


def trainer(
    task: Task, optimizer: Optimizer, schedule: Schedule, proceed: Callable[[], bool]
) -> Callable[[Setting, Start, Parts], Curve]:
    """The function from a setting, a start and the data to a curve.

    Args:
        task: what to train.
        optimizer: how.
        schedule: batches and records.
        proceed: called on the host before every record; where it returns false, what is left of
            the training is skipped.
    """

    def train(setting: Setting, start: Start, parts: Parts) -> Curve:
        batch = batches(start.order, parts.train, schedule)
        step = optim.step(task.apply, task.loss, optimizer.build(**setting))

        def one(i: jax.Array, carry: Any) -> Any:
            params, state = carry
            params, state, _ = step(params, state, batch(i), key=jax.random.fold_in(start.key, i))
            return params, state

        def advance(carry: Any, since: jax.Array, until: jax.Array) -> Any:
            params, state = lax.fori_loop(since, until, one, carry)
            return (params, state), record(task, params, parts)

        def skip(carry: Any, since: jax.Array, until: jax.Array) -> Any:
            like = jax.eval_shape(lambda params: record(task, params, parts), carry[0])
            return carry, jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), like)

        def interval(carry: Any, span: tuple[jax.Array, jax.Array]) -> Any:
            on = io_callback(lambda: np.bool_(proceed()), jax.ShapeDtypeStruct((), bool))
            return lax.cond(on, advance, skip, carry, *span)

        stops = np.array(schedule.stops)
        spans = jnp.asarray(np.append(0, stops[:-1])), jnp.asarray(stops)
        state = step.init(start.params, batch(0), key=start.key)
        return lax.scan(interval, (start.params, state), spans)[1]

    return train


def starts(task: Task, schedule: Schedule, seeds: Sequence[int]) -> Start:
    """The starts from K seeds, leading axes K.

    Where a batch is everything, there is no order to draw, so that all lanes share the batch.
    """
    examples = len(task.train[0])
    shuffles = -(-schedule.steps * schedule.batch_size // examples)
    shuffles = 0 if schedule.batch_size >= examples else max(1, shuffles)
    return _starts(task.init, examples, shuffles, jnp.asarray(seeds))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _starts(
    init: Callable[[jax.Array], Params], examples: int, shuffles: int, seeds: jax.Array
) -> Start:
    def start(seed: jax.Array) -> Start:
        init_key, order_key, key = jax.random.split(jax.random.key(seed), 3)
        keys = jax.random.split(order_key, shuffles)
        order = jax.vmap(lambda key: jax.random.permutation(key, examples))(keys)
        return Start(init(init_key), order.reshape(-1), key)

    return jax.vmap(start)(seeds)


def batches(order: jax.Array, data: Data, schedule: Schedule) -> Batches:
    """The function from a step to its batch: one shuffle of the examples after another."""
    size = schedule.batch_size
    if size >= len(data[0]):
        return lambda step: data

    def batch(step: Any) -> Data:
        chosen = lax.dynamic_slice_in_dim(order, step * size, size)
        return data[0][chosen], data[1][chosen]

    return batch


def record(task: Task, params: Params, parts: Parts) -> Curve:
    """One point of the curves, by one pass over all that is measured, a chunk at a time."""

    def one(example: Data) -> tuple[jax.Array, jax.Array]:
        output = task.apply(params, example[0])
        return task.loss(output, example[1]), task.score(output, example[1])

    losses, scores = lax.map(one, parts.measured, batch_size=parts.chunk)
    seen, tested = slice(0, parts.seen), slice(parts.seen, parts.seen + parts.tested)
    # The mean of no test part is NaN.
    return Curve(jnp.mean(losses[seen]), jnp.mean(losses[tested]), jnp.mean(scores[tested]))


def parts_of(task: Task, evaluated: int) -> Parts:
    """The task's data on the device; of either part at most ``evaluated`` examples are measured."""
    chosen = [_some(len(part[0]), evaluated) for part in (task.train, task.test)]
    seen, tested = map(len, chosen)
    chunk = -(-(seen + tested) // -(-(seen + tested) // EVALUATED_AT_ONCE))
    spare = -(seen + tested) % chunk
    measured = []
    for train, test in zip(task.train, task.test, strict=True):
        rows = np.concatenate([train[chosen[0]], test[chosen[1]]])
        measured.append(np.concatenate([rows, np.repeat(rows[-1:], spare, axis=0)]))
    return Parts(_on_device(task.train), _on_device(measured), seen, tested, chunk)


def _some(examples: int, count: int) -> np.ndarray:
    """At most ``count`` indices, spread evenly: data sets are often ordered by class."""
    return np.linspace(0, examples - 1, min(count, examples)).round().astype(int)


def _on_device(part: Sequence[np.ndarray]) -> Data:
    return jnp.asarray(part[0]), jnp.asarray(part[1])


def stops(last: int, records: int) -> tuple[int, ...]:
    """About ``records`` steps that suit both kinds of axis, 0 and ``last`` among them.

    Half of them are spaced evenly in the logarithm of the step, half in the step.
    """
    half = max(2, records // 2)
    places = np.concatenate([np.geomspace(1, last, half), np.linspace(last / half, last, half)])
    return tuple(sorted({0, *(round(float(place)) for place in places if place >= 1)}))
