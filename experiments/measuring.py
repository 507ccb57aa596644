"""Timing two programs in alternation and pair by pair, and what memory there is for them."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Ratio:
    """One over the other: median of paired ratios, their quartiles, the other's median itself.

    ``pairs`` is of how many.
    """

    median: float
    lower: float
    upper: float
    reference: float
    pairs: int

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        ratios = np.array(ours) / np.maximum(np.array(theirs), 1e-12)
        lower, median, upper = np.quantile(ratios, [0.25, 0.5, 0.75])
        middle = statistics.median(theirs)
        return cls(float(median), float(lower), float(upper), middle, len(ratios))

    def said(self, digits: int) -> str:
        """The median ± half the distance between the quartiles; of one pair, the ratio alone."""
        spread = f" ±{(self.upper - self.lower) / 2:.{digits}f}" if self.pairs > 1 else ""
        return f"{self.median:.{digits}f}{spread}"


def alternate(
    work: Callable[[int], Any], pairs: int, fresh: bool = False
) -> tuple[list[float], list[float]]:
    """Seconds that `work(0)` and `work(1)` take, in pairs whose order changes.

    With `fresh`, JAX forgets before each what it has traced and compiled.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(pairs):
        for side in (i % 2, 1 - i % 2):
            if fresh:
                jax.clear_caches()
            start = time.perf_counter()
            work(side)
            seconds[side].append(time.perf_counter() - start)
    return seconds


def memory_of_device() -> int:
    """Bytes of the first device's memory; of a CPU's, the machine's."""
    known = jax.devices()[0].memory_stats() or {}
    return known.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
