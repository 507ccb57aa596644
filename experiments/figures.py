"""The figures of a comparison: curves against steps, seconds and work; the search."""

import math
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from experiments.looks import LINES, LOOKS
from experiments.optimizers import OPTIMIZERS
from experiments.outcome import Outcome, Quantity

AXES = {"steps": "steps", "seconds": "seconds", "gradients": "gradient-equivalents"}
COLUMNS = 4  # panels beside each other
BEYOND = 1e30  # stands for infinity, which cannot be drawn


def curves(path: Path, outcomes: Sequence[Outcome], target: float, score_name: str) -> None:
    """Draw losses and test score: medians over seeds as lines, quartiles as bands."""
    rows: dict[Quantity, str] = {"train_loss": "training loss"}
    if not any(np.isnan(outcome.curve("test_loss").median).all() for outcome in outcomes):
        rows |= {"test_loss": "test loss", "test_score": score_name}
    with _canvas(len(rows), 3, 2.0, sharey="row", sharex="col") as (figure, panels):
        for row, (quantity, label) in zip(panels, rows.items(), strict=True):
            for panel, axis in zip(row, AXES, strict=True):
                for outcome in outcomes:
                    _draw_curve(panel, outcome, axis, quantity)
                _logarithmic(panel)
            if quantity != "test_score" or not outcomes[0].score_rises:
                row[0].set_yscale("log")
            row[0].set_ylabel(label)
            _frame(row[0], outcomes, quantity)
        for panel in panels[0]:
            panel.axhline(target, color="black", linewidth=0.5, label="target")
        for panel, label in zip(panels[-1], AXES.values(), strict=True):
            panel.set_xlabel(label)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
        figure.align_ylabels()
        figure.savefig(path, dpi=200)


def search(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Draw the last training loss of every setting, a panel per optimizer that was searched.

    A point is a median over seeds, its bar the quartiles; of two hyper-parameters the second is the
    colour, of which there is a legend, or for many values a scale. Settings that diverged, or ended
    above ten times the highest start, stand as crosses at the upper edge.
    """
    searched = [outcome for outcome in outcomes if outcome.setting]
    if not searched:
        return
    starts = np.stack([outcome.found.curves.train_loss[..., 0].max() for outcome in searched])
    most = 10 * starts.max() if np.isfinite(starts).all() else BEYOND
    across = min(COLUMNS, len(searched))
    with _canvas(-(-len(searched) // across), across, 1.9, sharey=True) as (figure, panels):
        for panel in panels.flat[len(searched) :]:
            panel.axis("off")
        for panel, outcome in zip(panels.flat, searched, strict=False):
            _draw_search(panel, outcome, most)
        ends = np.concatenate([np.stack(outcome.final) for outcome in searched], axis=None)
        ends = ends[(ends < most) & (ends > 0)]
        if ends.size:
            margin = max(1.5, (ends.max() / ends.min()) ** 0.05)
            panels[0, 0].set_ylim(ends.min() / margin, margin * ends.max())
        else:
            panels[0, 0].set_ylim(0.1, 1)
        for row in panels:
            row[0].set_ylabel("last training loss")
        figure.savefig(path, dpi=200)


def _logarithmic(panel) -> None:
    """A logarithmic axis of x; between powers of ten short ranges have labels at 2 and 5.

    Within one power of ten the labels are round numbers.
    """
    from matplotlib.ticker import LogFormatterMathtext, MaxNLocator, NullLocator, StrMethodFormatter

    class Sparse(LogFormatterMathtext):
        def __call__(self, x, pos=None):
            digit = x / 10 ** math.floor(math.log10(x))
            return super().__call__(x, pos) if min(abs(digit - 2), abs(digit - 5)) < 1e-6 else ""

    panel.set_xscale("log")
    least, most = panel.get_xlim()
    if most < 10 * least:
        panel.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
    else:
        panel.xaxis.set_minor_formatter(Sparse(minor_thresholds=(1, 0.4)))


@contextmanager
def _canvas(rows: int, columns: int, height: float, **sharing: Any):
    """A figure and its panels, with this project's looks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    minor: dict[Any, Any] = {"xtick.minor.size": 0, "lines.markersize": 3}
    with plt.rc_context(LOOKS | LINES | minor):
        size = 7.5, height * rows + 0.9
        figure, panels = plt.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained", **sharing
        )
        yield figure, panels
        plt.close(figure)


def _draw_curve(panel: Any, outcome: Outcome, axis: str, quantity: Quantity) -> None:
    row = OPTIMIZERS[outcome.name]
    each = {"steps": 1, "seconds": outcome.cost.seconds, "gradients": outcome.cost.gradients}
    across = outcome.steps[1:] * each[axis]
    lower, median, upper = (values[1:] for values in outcome.curve(quantity))
    look = {"linestyle": (0, (4, 1.5)) if row.first_order else "-"}
    if len(across) == 1:  # a line of one point is nothing to see
        look["marker"] = "o"
    panel.plot(across, median, color=row.colour, label=row.label, **look)
    lower, upper = (np.minimum(values, BEYOND) for values in (lower, upper))
    panel.fill_between(across, lower, upper, color=row.colour, alpha=0.15, linewidth=0)


def _frame(panel: Any, outcomes: Sequence[Outcome], quantity: Quantity) -> None:
    """Show where the optimizers differ, not how far a bad start or a divergence went."""
    curves = [outcome.curve(quantity) for outcome in outcomes]
    medians = [curve.median for curve in curves]
    values = np.concatenate(medians)
    values = values[np.isfinite(values)]
    if not values.size:
        return
    if quantity == "test_score" and panel.get_yscale() == "linear":
        panel.set_ylim(max(0.0, values.max() - 0.35), min(1.005, values.max() + 0.02))
    elif panel.get_yscale() == "log":
        start = max((median[0] for median in medians if np.isfinite(median[0])), default=np.inf)
        least = np.concatenate([curve.lower for curve in curves])
        least = least[np.isfinite(least) & (least > 0)]
        panel.set_ylim(least.min() / 1.5 if least.size else None, 1.5 * start)


def _draw_search(panel: Any, outcome: Outcome, most: float) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm

    names = list(outcome.setting)
    values = np.array([[setting[name] for name in names] for setting in outcome.settings])
    lower, median, upper = outcome.final
    groups = np.unique(values[:, 1]) if len(names) > 1 else np.array([np.nan])
    shades = ListedColormap(colormaps["viridis"](np.linspace(0, 0.85, 256)))
    scale = LogNorm(groups[0], groups[-1])
    for group in groups:
        colour = shades(scale(group) if len(groups) > 1 else 0.0)
        own = np.flatnonzero(values[:, 1] == group) if len(names) > 1 else np.arange(len(values))
        own = own[np.argsort(values[own, 0])]
        kept, lost = own[median[own] < most], own[median[own] >= most]
        ends = lower[kept], np.minimum(upper[kept], BEYOND)
        bars = np.stack([median[kept] - ends[0], ends[1] - median[kept]])
        label = f"{names[1]} {group:.2g}" if len(names) > 1 else None
        panel.errorbar(values[kept, 0], median[kept], bars, color=colour, fmt="o-", label=label)
        panel.plot(
            values[lost, 0], np.full(len(lost), 0.97), "x", color=colour,
            transform=panel.get_xaxis_transform(),
        )  # fmt: skip
    _logarithmic(panel)
    panel.set_yscale("log")
    panel.set_xlabel(names[0].replace("_", " "))
    panel.set_title(OPTIMIZERS[outcome.name].label, fontsize=8)
    if 1 < len(groups) <= 5:
        panel.legend(fontsize=6, frameon=False)
    elif len(groups) > 5:
        bar = panel.figure.colorbar(ScalarMappable(scale, shades), ax=panel)
        bar.set_label(names[1].replace("_", " "))
