"""What a run leaves behind: its configuration, its curves as they arise, a summary, a figure."""

import csv
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.table import Table

from experiments.command import ExperimentError, UsageError
from experiments.training import MethodName, Record

# Okabe and Ito's colours are told apart with any colour vision; the dashes help in print.
STYLES: dict[MethodName, dict[str, Any]] = {
    "sgd": {"label": "SGD", "color": "#E69F00", "linestyle": (0, (1, 1))},
    "momentum": {"label": "momentum", "color": "#009E73", "linestyle": (0, (4, 1.5))},
    "adam": {"label": "Adam", "color": "#0072B2", "linestyle": (0, (4, 1.5, 1, 1.5))},
    "gauss-newton": {
        "label": "Gauss–Newton",
        "color": "#D55E00",
        "linestyle": "-",
        "marker": "o",
        "markersize": 2.5,
    },
}
AXES = {
    "step": "steps",
    "seconds": "seconds",
    "gradients": "gradient-equivalents",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """How a method ended: its last record, the time its compilation took, a remark if any."""

    record: Record
    compile_seconds: float
    remark: str | None

    def as_dict(self) -> dict[str, Any]:
        """The record's fields and the rest, side by side."""
        rest = {"compile_seconds": self.compile_seconds, "remark": self.remark}
        return self.record._asdict() | rest


class Curves:
    """``curves.csv``, a line per record, on the disk as soon as it is written."""

    def __init__(self, folder: Path) -> None:
        self.file = (folder / "curves.csv").open("w", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file)
        self.writer.writerow(Record._fields)
        self.file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()

    def append(self, record: Record) -> None:
        """Write one record; the test's fields are left empty where there is no test part."""
        self.writer.writerow(record)
        self.file.flush()


def make_folder(out: Path, name: str | None, fallback: str, *, overwrite: bool) -> Path:
    """The folder of a run, made if need be.

    Args:
        out: the folder of all runs.
        name: of this run; ``None`` takes ``fallback``, with a number if that name is taken.
        fallback: see ``name``.
        overwrite: whether a folder that exists may be written to.

    Raises:
        UsageError: the name is taken.
        ExperimentError: the folder cannot be written to.
    """
    folder = out / (name or fallback)
    if not overwrite and name is None:
        number = 2
        while folder.exists():
            folder = out / f"{fallback}-{number}"
            number += 1
    elif not overwrite and folder.exists():
        raise UsageError(f"{folder} exists; give another --name, or --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / "curves.csv"
        probe.touch()
    except OSError as error:
        reason = error.strerror or error
        raise ExperimentError(f"cannot write to {folder} ({reason}); give another --out") from None
    return folder


def write_json(path: Path, content: Any) -> None:
    """Write ``content``, readable; NaN and infinities become ``null``, which JSON has in place."""
    path.write_text(json.dumps(_finite(content), indent=2, default=str) + "\n", encoding="utf-8")


def print_results(console: Console, results: Sequence[Result], score_name: str) -> None:
    """The final table."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method")
    headers = ("training loss", "test loss", score_name)
    for header in (*headers, "steps", "seconds", "compiling", "gradient-equivalents"):
        table.add_column(header, justify="right")
    for result in results:
        record = result.record
        table.add_row(
            record.method,
            *(_number(value) for value in (record.train_loss, record.test_loss, record.test_score)),
            f"{record.step}",
            f"{record.seconds:.2f}",
            f"{result.compile_seconds:.2f}",
            f"{record.gradients:.1f}",
        )
    console.print(table)


def plot(path: Path, records: Sequence[Record], score_name: str) -> None:
    """Draw training loss and test score against steps, seconds and work into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    scored = any(record.test_score is not None for record in records)
    rows = 2 if scored else 1
    settings: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with plt.rc_context(settings):
        figure, panels = plt.subplots(
            rows, 3, figsize=(7.5, 2.3 * rows + 0.5), sharey="row", sharex="col", squeeze=False
        )
        for panel, axis in zip(panels[0], AXES, strict=True):
            _draw(panel, records, axis, "train_loss")
            panel.set_yscale("log")
        panels[0][0].set_ylabel("training loss")
        if scored:
            for panel, axis in zip(panels[1], AXES, strict=True):
                _draw(panel, records, axis, "test_score")
            panels[1][0].set_ylabel(score_name)
            _frame_scores(panels[1][0], records, score_name)
        for panel, label in zip(panels[-1], AXES.values(), strict=True):
            panel.set_xscale("log")
            panel.xaxis.set_minor_formatter(NullFormatter())  # they collide within one decade
            panel.set_xlabel(label)
        for panel in panels.flat:
            panel.grid(True, which="major", linewidth=0.4, alpha=0.5)
        figure.align_ylabels()
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
        figure.set_layout_engine("constrained")
        figure.savefig(path, dpi=200)
        plt.close(figure)


def _draw(panel: Any, records: Sequence[Record], axis: str, quantity: str) -> None:
    for method, style in STYLES.items():
        own = [record for record in records if record.method == method and record.step]
        if own:
            across = [getattr(record, axis) for record in own]
            panel.plot(across, [getattr(r, quantity) for r in own], linewidth=1.3, **style)


def _frame_scores(panel: Any, records: Sequence[Record], score_name: str) -> None:
    """Show the scores where the methods differ: high accuracies, errors on a logarithmic axis."""
    if score_name != "test accuracy":
        panel.set_yscale("log")
        return
    best = max(record.test_score or 0.0 for record in records)
    panel.set_ylim(max(0.0, best - 0.35), min(1.005, best + 0.02))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
