"""What one sees while training runs: a bar per method on a terminal, a line now and then in a pipe.

The lines of a pipe go to the console given; nothing in them depends on how wide it is.
"""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from experiments.training import MethodName, Record

_LINES = 4  # how many lines a method prints on its way where there is no terminal


class ProgressDisplay:
    """Shows records as they arrive; a context manager."""

    def __init__(self, console: Console, budget: float, score_name: str) -> None:
        self.console = console
        self.budget = budget
        self.score_name = score_name
        self.bars: dict[MethodName, TaskID] = {}
        self.printed: dict[MethodName, int] = {}
        self.progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[numbers]}"),
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

    def show(self, record: Record) -> None:
        """Move the method's bar to this record, or print a line if it is time for one."""
        if not self.console.is_terminal:
            self._print_now_and_then(record)
            return
        if record.method not in self.bars:
            self.bars[record.method] = self.progress.add_task(
                record.method, total=self.budget, numbers=""
            )
        self.progress.update(
            self.bars[record.method],
            completed=min(record.gradients, self.budget),
            numbers=self._numbers(record),
        )

    def finish(self, method: MethodName, remark: str | None) -> None:
        """The method has ended: stop its bar, and say why if there is more to say than that."""
        if method in self.bars:
            self.progress.stop_task(self.bars[method])
        if remark:
            self.console.print(remark, soft_wrap=True)

    def _print_now_and_then(self, record: Record) -> None:
        reached = int(_LINES * min(1.0, record.gradients / self.budget))
        if reached > self.printed.get(record.method, -1):
            self.printed[record.method] = reached
            self.console.print(
                f"{record.method:<12}  step {record.step:>6}  {self._numbers(record)}",
                soft_wrap=True,
            )

    def _numbers(self, record: Record) -> str:
        shown = f"loss {record.train_loss:.3e}"
        if record.test_score is not None:
            shown += f"  {self.score_name} {record.test_score:.4g}"
        return shown
