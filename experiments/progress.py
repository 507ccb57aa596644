"""What one sees while training runs: a bar per optimizer on a terminal, a line at its end.

The lines go to the console given; nothing in them depends on how wide it is.
"""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class ProgressDisplay:
    """Shows how far each optimizer's search is; a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: TaskID | None = None
        self.progress = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[doing]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def begin(self, label: str) -> None:
        """A new bar, for an optimizer that is being compiled."""
        self.bar = self.progress.add_task(label, total=None, doing="compiling")

    def started(self, records: int) -> None:
        """Training starts; the bar is full after so many records."""
        self._update(total=records, doing="training")

    def recorded(self) -> None:
        """One record more; called from another thread."""
        self._update(advance=1)

    def measuring(self) -> None:
        """Training is over; steps are timed."""
        self._update(doing="timing a step")

    def finish(self, line: str) -> None:
        """The optimizer has ended: stop its bar and say how."""
        self._update(doing="")
        if self.bar is not None:
            self.progress.stop_task(self.bar)
        self.console.print(line, soft_wrap=True)

    def _update(self, **changes) -> None:
        if self.bar is not None:
            self.progress.update(self.bar, **changes)
