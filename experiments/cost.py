"""What a step costs beside a gradient, measured: the unit of work that optimizers are compared in.

A step of an optimizer and a gradient of the mean loss over the same batch are compiled, each on its
own and not mapped, and timed in alternation in one process. The gradient-equivalents of a step are

    (seconds of the step / seconds of the gradient) · B / N,

so that one gradient of the whole training part, N examples, counts 1.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import fbackprop as fb
from experiments.measuring import Ratio, alternate
from experiments.optimizers import Optimizer, Setting
from experiments.tasks import Task
from experiments.training import Parts, Schedule, Start, batches
from fbackprop import optim

TOGETHER = 10  # calls timed as one: what is done every few steps is spread over all
BLOCKS = 5
PATIENCE = 1.0  # seconds that a block may take, if one call does not


class Cost(NamedTuple):
    """Seconds of a step, and how many gradients of the whole training part it is worth."""

    seconds: float
    gradients: float


def measure(
    task: Task,
    optimizer: Optimizer,
    setting: Setting,
    schedule: Schedule,
    parts: Parts,
    start: Start,
) -> Cost:
    """Time consecutive steps, from the start of training on; medians over blocks of up to ten."""
    step = optim.step(task.apply, task.loss, optimizer.build(**setting))
    batch = batches(start.order, parts.train, schedule)
    ready = [jax.block_until_ready(batch(i)) for i in range(min(TOGETHER, schedule.steps))]
    keys = list(jax.random.split(start.key, TOGETHER))
    gradient = jax.jit(fb.grad(task.mean_loss))
    move = jax.jit(lambda params, state, batch, key: step(params, state, batch, key=key))
    now = [start.params, step.init(start.params, ready[0], key=start.key)]

    def work(side: int) -> None:
        for i in range(calls):
            if side:
                jax.block_until_ready(gradient(start.params, *ready[i % len(ready)]))
            else:
                now[:] = jax.block_until_ready(move(*now, ready[i % len(ready)], keys[i]))[:2]

    calls = 1
    calls = _calls(lambda: work(0), lambda: work(1))
    steps, gradients = alternate(work, BLOCKS)
    ratio = Ratio.of(steps, gradients)
    seconds = Ratio.of(gradients, steps).reference / calls
    return Cost(seconds, ratio.median * schedule.batch_size / len(parts.train[0]))


def _calls(*works: Callable[[], Any]) -> int:
    """How many calls to time as one, judged by the slower of two compiled calls."""
    slowest = 0.0
    for work in works:
        work()  # compiles
        before = time.perf_counter()
        work()
        slowest = max(slowest, time.perf_counter() - before)
    return max(1, min(TOGETHER, int(PATIENCE / max(slowest, 1e-9))))
