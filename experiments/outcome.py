"""What comes of an optimizer: its best setting, how that ended, and when it reached a target.

The best setting is the one of the lowest median, over seeds, of the last training loss. A loss that
is not a number counts as infinite. Medians and quartiles are values that occurred, so infinity is
one of them like any other: of an even number of seeds the median is the worse one in the middle.
The upper quartile is as far from the end as the lower one.

Index legend: S settings, K seeds, R records.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.cost import Cost
from experiments.optimizers import OPTIMIZERS, OptimizerName, Setting
from experiments.search import Found
from experiments.training import Schedule

Quantity = Literal["train_loss", "test_loss", "test_score"]


class Quartiles(NamedTuple):
    """Over seeds; numbers, or arrays over records."""

    lower: Any
    median: Any
    upper: Any


class Reached(NamedTuple):
    """When the best setting reached a target: from how many seeds, and quartiles over all."""

    seeds: int
    steps: Quartiles
    seconds: Quartiles
    gradients: Quartiles


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one optimizer: all that was measured."""

    name: OptimizerName
    settings: list[Setting]
    seeds: list[int]
    schedule: Schedule
    found: Found
    cost: Cost
    score_rises: bool = True  # where it gets better, as accuracy does and an error does not

    @property
    def steps(self) -> np.ndarray:
        """The steps of the records, (R,)."""
        return np.array(self.schedule.stops)

    @property
    def final(self) -> Quartiles:
        """Of the last training loss, for every setting, (S,)."""
        return final_losses(self.found)

    @property
    def best(self) -> int:
        """The index of the best setting."""
        return best_setting(self.found)

    @property
    def setting(self) -> Setting:
        """The best setting."""
        return self.settings[self.best]

    def curve(self, quantity: Quantity) -> Quartiles:
        """Of the best setting, (R,); NaN where there is no test part."""
        values = getattr(self.found.curves, quantity)[self.best]
        if quantity == "test_score" and self.score_rises:
            return quartiles(values, worse="lower")
        untested = quantity != "train_loss" and np.isnan(values[:, 0]).all()
        return quartiles(values if untested else finite(values))

    def end(self, quantity: Quantity) -> Quartiles:
        """Of the best setting at its last record, three numbers."""
        return Quartiles(*(float(values[-1]) for values in self.curve(quantity)))

    @property
    def lowered(self) -> bool:
        """Whether the best setting ended no higher than it began."""
        median = self.curve("train_loss").median
        return bool(np.isfinite(median[-1]) and median[-1] <= median[0])

    def reach(self, target: float) -> Reached:
        """When the best setting's training loss was recorded at or below ``target`` first."""
        losses = self.found.curves.train_loss[self.best]
        below = np.isfinite(losses) & (losses <= target)
        first = np.where(below.any(1), self.steps[below.argmax(1)], np.inf)
        counts = quartiles(first[:, None])
        steps, seconds, gradients = (
            Quartiles(*(float(count[0]) * each for count in counts))
            for each in (1, self.cost.seconds, self.cost.gradients)
        )
        return Reached(int(below.any(1).sum()), steps, seconds, gradients)

    def at_the_edge(self) -> list[str]:
        """The hyper-parameters whose best value is the smallest or the largest tried."""
        tried = {name: [setting[name] for setting in self.settings] for name in self.setting}
        return [
            name
            for name, value in self.setting.items()
            if len(set(tried[name])) > 1 and value in (min(tried[name]), max(tried[name]))
        ]


def final_losses(found: Found) -> Quartiles:
    """Of the last training loss over seeds, for every setting, (S,)."""
    return quartiles(finite(found.curves.train_loss[..., -1]).T)


def best_setting(found: Found) -> int:
    """The index of the setting of the lowest median."""
    return int(np.argmin(final_losses(found).median))


def quartiles(values: np.ndarray, worse: Literal["higher", "lower"] = "higher") -> Quartiles:
    """Over the first axis."""
    lower, upper = (
        sign * np.quantile(sign * values, 0.25, axis=0, method="inverted_cdf") for sign in (1, -1)
    )
    return Quartiles(lower, np.quantile(values, 0.5, axis=0, method=worse), upper)


def finite(losses: np.ndarray) -> np.ndarray:
    """The losses, infinite where they are not numbers."""
    return np.where(np.isnan(losses), np.inf, losses)


def target_of(outcomes: Sequence[Outcome]) -> float:
    """The loss at which the best first-order method ended, or without one, the highest end.

    Of methods that lowered the loss; NaN, which none reaches, if none did.
    """
    lowered = [outcome for outcome in outcomes if outcome.lowered]
    first = [outcome for outcome in lowered if OPTIMIZERS[outcome.name].first_order]
    ends = [outcome.end("train_loss").median for outcome in first or lowered]
    return float((min if first else max)(ends, default=np.nan))
