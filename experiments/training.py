"""Training by any method: one compiled loop, a record of the curves, a common unit of work.

The unit is the gradient-equivalent: one gradient of the mean loss over the whole training part.
A backward pass costs about two forward passes, so in this unit, for the whole training part,

    gradient 1,    loss alone 1/3,    Gauss-Newton product 2,

and a share of the training part costs that share. The product's 2 is an upper bound: Jv costs two
forward passes, Jᵀ three with a forward pass of its own, 5/3 in all. A Gauss-Newton step of k
products on everything thus costs 1 + 2k + 1/3.
"""

import enum
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fbackprop as fb
from experiments import gauss_newton
from experiments.tasks import Params, Task

MethodName = Literal["sgd", "momentum", "adam", "gauss-newton"]

GRADIENT, LOSS, PRODUCT = 1.0, 1 / 3, 2.0  # costs on the whole training part
HOPELESS_DAMPING = 1e12  # no step of any length lowers the loss


Evaluator = Callable[[Params], tuple[float, float | None, float | None]]


class Status(enum.IntEnum):
    """Why training goes on or has ended."""

    RUNNING = 0
    NOT_FINITE = 1
    CONVERGED = 2


class Outcome(NamedTuple):
    """What one step of a method did: new parameters and memory, its cost on its own batch."""

    params: Params
    memory: Any
    cost: jax.Array
    status: jax.Array


class Method(NamedTuple):
    """An optimiser: its memory at the start and its step on a batch of ``batch_size``."""

    name: MethodName
    batch_size: int
    init: Callable[[Params], Any]
    step: Callable[[Params, Any, jax.Array, jax.Array], Outcome]
    advice: str


class State(NamedTuple):
    """Where training stands."""

    params: Params
    memory: Any
    step: jax.Array
    work: jax.Array
    status: jax.Array


class Record(NamedTuple):
    """One point of the curves; losses are means over examples, ``seconds`` those of steps alone.

    The test's numbers are ``None`` where there is no test part.
    """

    method: MethodName
    step: int
    seconds: float
    gradients: float
    train_loss: float
    test_loss: float | None
    test_score: float | None


class Progress(NamedTuple):
    """A record and how training stands there; ``compile_seconds`` is the same throughout."""

    record: Record
    status: Status
    compile_seconds: float


def first_order(
    task: Task,
    name: Literal["sgd", "momentum", "adam"],
    *,
    learning_rate: float,
    batch_size: int,
) -> Method:
    """Steps along the gradient of a batch, as optax transforms it; momentum is 0.9."""
    transformation = {
        "sgd": lambda: optax.sgd(learning_rate),
        "momentum": lambda: optax.sgd(learning_rate, momentum=0.9),
        "adam": lambda: optax.adam(learning_rate),
    }[name]()

    def step(params: Params, memory: Any, inputs: jax.Array, targets: jax.Array) -> Outcome:
        loss, gradient = fb.value_and_grad(task.mean_loss)(params, inputs, targets)
        change, memory = transformation.update(gradient, memory, params)
        status = jnp.where(jnp.isfinite(loss), Status.RUNNING, Status.NOT_FINITE)
        return Outcome(optax.apply_updates(params, change), memory, jnp.asarray(GRADIENT), status)

    advice = f"try a lower --learning-rate (it was {learning_rate:g})"
    return Method(name, batch_size, transformation.init, step, advice)


def second_order(task: Task, *, damping: float, iterations: int, batch_size: int) -> Method:
    """Damped Gauss-Newton steps; the memory is the damping."""

    def step(params: Params, memory: jax.Array, inputs: jax.Array, targets: jax.Array) -> Outcome:
        taken = gauss_newton.step(task, params, memory, inputs, targets, iterations=iterations)
        done = (taken.loss == 0) | (taken.damping > HOPELESS_DAMPING)
        status = jnp.where(done, Status.CONVERGED, Status.RUNNING)
        status = jnp.where(jnp.isfinite(taken.loss), status, Status.NOT_FINITE)
        cost = GRADIENT + PRODUCT * taken.products + LOSS
        return Outcome(taken.params, taken.damping, cost, status)

    def init(params: Params) -> jax.Array:
        return jnp.asarray(damping, jax.tree.leaves(params)[0].dtype)

    advice = f"try a larger --damping (it was {damping:g}) or another --seed"
    return Method("gauss-newton", batch_size, init, step, advice)


def evaluator(task: Task) -> Evaluator:
    """A compiled function from parameters to the means that a record holds."""
    parts = _on_device(task.train), _on_device(task.test)

    @jax.jit
    def measure(params: Params, parts):
        train_loss, _ = task.evaluate(params, *parts[0])
        return train_loss, *(task.evaluate(params, *parts[1]) if len(parts[1][0]) else ())

    def evaluate(params: Params) -> tuple[float, float | None, float | None]:
        train_loss, *tested = map(float, measure(params, parts))
        return train_loss, *(tested or (None, None))

    return evaluate


def train(
    task: Task,
    method: Method,
    evaluate: Evaluator,
    *,
    budget: float,
    records: int,
    seed: int,
) -> Iterator[Progress]:
    """Train from the seed's initial parameters and yield the curves as they arise.

    Args:
        task: what to train.
        method: how.
        evaluate: what measures a record; made once by ``evaluator`` it is compiled once.
        budget: gradient-equivalents to spend.
        records: about how many points of the curves to take; a Gauss-Newton step is always one.
        seed: of the initial parameters, the same for every method, and of the batches.

    Yields:
        the state at step 0, then at growing steps until the budget is spent or the method stops.
    """
    examples = len(task.train[0])
    share = method.batch_size / examples
    cheapest = GRADIENT if method.name != "gauss-newton" else GRADIENT + PRODUCT + LOSS
    last = max(1, int(budget / (share * cheapest)))
    order = jnp.asarray(batches(examples, method.batch_size, last, seed))
    train_part = _on_device(task.train)

    def advance(state: State, inputs, targets, order, stop) -> State:
        def unfinished(state: State):
            running = state.status == Status.RUNNING
            return (state.step < stop) & (state.work < budget) & running

        def body(state: State) -> State:
            chosen = order[state.step]
            params, memory, cost, status = method.step(
                state.params, state.memory, inputs[chosen], targets[chosen]
            )
            work = state.work + (share * cost).astype(state.work.dtype)
            return State(params, memory, state.step + 1, work, status.astype(jnp.int32))

        return jax.lax.while_loop(unfinished, body, state)

    params = task.init(jax.random.key(seed))
    running = jnp.asarray(Status.RUNNING, jnp.int32)
    state = State(params, method.init(params), jnp.int32(0), jnp.zeros(()), running)
    started = time.perf_counter()
    # Compiled ahead, so that the seconds of the curves are those of training.
    move = jax.jit(advance).lower(state, *train_part, order, jnp.int32(0)).compile()
    jax.block_until_ready(move(state, *train_part, order, jnp.int32(1)))  # the first call is slow
    compile_seconds = time.perf_counter() - started

    def progress(state: State, seconds: float) -> Progress:
        done = int(state.step), seconds, float(state.work)
        record = Record(method.name, *done, *evaluate(state.params))
        status = Status(int(state.status))
        if not np.isfinite(record.train_loss):
            status = Status.NOT_FINITE
        return Progress(record, status, compile_seconds)

    seconds = 0.0
    yield progress(state, seconds)
    for stop in stops(last, records, every=method.name == "gauss-newton"):
        before = time.perf_counter()
        state = jax.block_until_ready(move(state, *train_part, order, jnp.int32(stop)))
        seconds += time.perf_counter() - before
        now = progress(state, seconds)
        yield now
        if now.status is not Status.RUNNING or now.record.gradients >= budget:
            return


def _on_device(part: tuple[np.ndarray, np.ndarray]) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(part[0]), jnp.asarray(part[1])


def batches(examples: int, size: int, count: int, seed: int) -> np.ndarray:
    """``count`` batches of indices, shape (count, size): one shuffle of the examples after another.

    A batch of everything is never shuffled.
    """
    if size == examples:
        return np.broadcast_to(np.arange(examples, dtype=np.int32), (count, examples))
    random = np.random.default_rng(seed)
    shuffles = -(-count * size // examples)
    order = np.concatenate([random.permutation(examples) for _ in range(shuffles)])
    return order[: count * size].reshape(count, size).astype(np.int32)


def stops(last: int, records: int, *, every: bool) -> list[int]:
    """The steps at which to take a record: all, or about ``records`` that suit both kinds of axis.

    Half of them are spaced evenly in the logarithm of the step, half in the step.
    """
    if every:
        return list(range(1, last + 1))
    half = max(2, records // 2)
    places = np.concatenate([np.geomspace(1, last, half), np.linspace(last / half, last, half)])
    return sorted({round(float(place)) for place in places if place >= 1})
