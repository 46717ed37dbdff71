"""Progress bars on standard error for long work."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class ProgressBar:
    """One bar. `advance` says that a step is done, `extend` that there are more steps than there were."""

    def __init__(self, progress: Progress, title: str, total: int):
        self._progress = progress
        self._task = progress.add_task(title, total=total)

    def advance(self) -> None:
        self._progress.advance(self._task)

    def extend(self, steps: int) -> None:
        self._progress.update(self._task, total=self._progress.tasks[self._task].total + steps)


@contextmanager
def progress_bar(title: str, total: int = 0, show: bool = True) -> Iterator[ProgressBar]:
    """A bar of `total` steps while the context is open; nothing is drawn unless `show`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as progress:
        yield ProgressBar(progress, title, total)
