"""Every setting from every seed, as one compiled ``vmap`` over all of them.

A lane is one setting with one seed. Where all lanes at once would take more memory than allowed,
they are trained in chunks of equal size, one after the other, by one compiled program.

Index legend: S settings, K seeds, R records.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.command import ExperimentError
from experiments.measuring import memory_of_device
from experiments.optimizers import HyperParameter, Optimizer, Setting
from experiments.tasks import Task
from experiments.training import Curve, Parts, Schedule, Start, trainer


class TooLarge(ExperimentError):
    """A single run does not fit into the device's memory."""


class Found(NamedTuple):
    """What a search found: curves of shape (S, K, R), and what it took.

    ``at_once`` is how many lanes a chunk had.
    """

    curves: Curve
    at_once: int
    compile_seconds: float
    seconds: float


def grid(optimizer: Optimizer, trials: int) -> list[Setting]:
    """At most ``trials`` settings, evenly spaced in the logarithm.

    With two hyper-parameters the first gets at least as many values as the second. A single value
    of one is the middle of its range.
    """
    names = list(optimizer.ranges)
    second = math.isqrt(trials)
    counts = [trials] if len(names) == 1 else [trials // second, second]
    values = {
        name: _spaced(*optimizer.ranges[name], count)
        for name, count in zip(names, counts, strict=False)
    }
    return product(values)


def product(values: Mapping[HyperParameter, Sequence[float]]) -> list[Setting]:
    """Every combination of the values of each hyper-parameter; one empty setting without any."""
    settings: list[Setting] = [{}]
    for name, choices in values.items():
        settings = [setting | {name: float(choice)} for setting in settings for choice in choices]
    return settings


def drawn(optimizer: Optimizer, trials: int, seed: int) -> list[Setting]:
    """``trials`` settings, each hyper-parameter log-uniform over its range; one if it has none."""
    random = np.random.default_rng(seed)
    ranges = {name: np.log(ends) for name, ends in optimizer.ranges.items()}
    return [
        {name: float(np.exp(random.uniform(*ends))) for name, ends in ranges.items()}
        for _ in range(trials if ranges else 1)
    ]


def _spaced(low: float, high: float, count: int) -> Sequence[float]:
    # Three significant digits, so that what is printed can be typed in again.
    values = np.geomspace(low, high, count) if count > 1 else [math.sqrt(low * high)]
    return [float(f"{value:.3g}") for value in values]


def search(
    task: Task,
    optimizer: Optimizer,
    settings: Sequence[Setting],
    starts: Start,
    schedule: Schedule,
    parts: Parts,
    *,
    memory: float,
    started: Callable[[int], None] = lambda records: None,
    recorded: Callable[[], None] = lambda: None,
) -> Found:
    """Train with every setting from every seed.

    Args:
        task: what to train.
        optimizer: how.
        settings: S of them.
        starts: from K seeds, leading axes K.
        schedule: batches and records.
        parts: the data.
        memory: what a chunk may take, in bytes.
        started: told how many records there will be, over all chunks, when training starts.
        recorded: called after each of them.

    Raises:
        KeyboardInterrupt: Ctrl-C; training has ended at its next record.
        TooLarge: a single lane takes more than the device has; nothing was run.
    """
    stopped = threading.Event()

    def proceed() -> bool:
        if not stopped.is_set():
            recorded()
        return not stopped.is_set()

    train = jax.jit(jax.vmap(trainer(task, optimizer, schedule, proceed), in_axes=(0, 0, None)))
    lanes = _lanes(settings, starts)
    before = time.perf_counter()
    compiled, at_once = _compiled(train, lanes, parts, memory)
    compile_seconds = time.perf_counter() - before
    chunks = list(_chunks(lanes, at_once))
    started(len(chunks) * len(schedule.stops))
    before = time.perf_counter()
    found = [_until_done(compiled, stopped, *chunk, parts) for chunk in chunks]
    seconds = time.perf_counter() - before
    shape = len(settings), len(starts.key), len(schedule.stops)
    curves = Curve(
        *(
            np.concatenate(leaves)[: shape[0] * shape[1]].reshape(shape)
            for leaves in zip(*found, strict=True)
        )
    )
    return Found(curves, at_once, compile_seconds, seconds)


def _lanes(
    settings: Sequence[Setting], starts: Start
) -> tuple[dict[HyperParameter, jax.Array], Start]:
    """Settings and starts of all lanes, leading axes S·K, the seeds running fastest."""
    seeds = len(starts.key)
    values = {
        name: jnp.repeat(jnp.asarray([setting[name] for setting in settings]), seeds)
        for name in settings[0]
    }
    which = jnp.tile(jnp.arange(seeds), len(settings))
    return values, jax.tree.map(lambda leaf: leaf[which], starts)


def _compiled(train: Any, lanes: Any, parts: Parts, memory: float) -> tuple[Any, int]:
    """The program for as many lanes at once as memory allows, and how many these are."""
    at_once = count = len(lanes[1].key)
    compiled = train.lower(*lanes, parts).compile()
    if (needed := _bytes(compiled)) > memory and count > 1:
        chunks = min(count, math.ceil(needed / memory))
        at_once = math.ceil(count / chunks)
        compiled = train.lower(*next(_chunks(lanes, at_once)), parts).compile()
    if (needed := _bytes(compiled)) > (most := memory_of_device()):
        raise TooLarge(
            f"{at_once} of its runs at once take {needed / 2**30:.0f} GiB of memory, and there are "
            f"{most / 2**30:.0f}: give a smaller --batch-size or --large-batch"
        )
    return compiled, at_once


def _bytes(compiled: Any) -> int:
    """What a program takes beside its arguments; nothing where the backend does not say."""
    analysis = compiled.memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def _chunks(lanes: Any, size: int) -> Iterator[Any]:
    """The lanes in chunks of one size, the last filled up with copies of the last lane."""
    count = len(lanes[1].key)
    for start in range(0, count, size):
        chosen = np.minimum(np.arange(start, start + size), count - 1)
        yield jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], lanes)


def _until_done(compiled: Any, stopped: threading.Event, *arguments: Any) -> Curve:
    """The result of a compiled call; Ctrl-C ends it at its next record.

    It runs in a thread of its own, because nothing reaches a thread that waits for XLA.
    """
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(lambda: jax.tree.map(np.asarray, compiled(*arguments)))
        try:
            while not call.done():
                time.sleep(0.01)
        except KeyboardInterrupt:
            stopped.set()
            raise
        return call.result()
