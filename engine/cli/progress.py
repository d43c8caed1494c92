"""The progress bar of verbs that take long."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[str, int, int | None], None]
"""Shows what is being done, how many steps are done, and how many there are (None: not known yet)."""


@contextmanager
def progress_bar(*, auto_refresh: bool = True) -> Iterator[Show]:
    """Show a progress bar on stderr if it is a terminal; elsewhere show nothing.

    With `auto_refresh` a thread keeps the clock ticking between steps. Pass False in a process that forks: the bar is
    then drawn at each step only, without a thread.
    """
    if not sys.stderr.isatty():
        yield lambda _doing, _done, _total: None
        return
    from rich.console import Console  # noqa: PLC0415  # only a terminal needs it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=auto_refresh) as progress:
        task = progress.add_task("", total=None)

        def show(doing: str, done: int, total: int | None) -> None:
            progress.update(task, description=doing, completed=done, total=total, refresh=not auto_refresh)

        yield show
