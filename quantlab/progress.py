"""Progress of long work: a bar with an estimate on a terminal, plain lines when piped, nothing when silent.

    with progress.task("perplexity", total=len(windows)) as advance:
        for window in windows:
            ...
            advance(1)

Tasks may nest. Everything goes to stderr: stdout belongs to results. `rich` is imported only when a bar is shown.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TextIO

Advance = Callable[[float], None]


class Progress(Protocol):
    def task(self, name: str, total: float | None = None) -> AbstractContextManager[Advance]:
        """Open a piece of work of `total` units (None: unknown); yields `advance(units)`."""

    def note(self, text: str) -> None:
        """Say one line that stays visible."""


def _ignore(units: float = 1) -> None:
    pass


class Silent:
    """Says nothing (tests, library use)."""

    @contextmanager
    def task(self, name: str, total: float | None = None) -> Iterator[Advance]:
        yield _ignore

    def note(self, text: str) -> None:
        pass


class Lines:
    """Plain lines for pipes and logs: every `every` seconds inside long work, and at the end of an outermost task."""

    def __init__(self, stream: TextIO | None = None, every: float = 10.0) -> None:
        self.stream = stream or sys.stderr
        self.every = every
        self._names: list[str] = []

    def note(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    @contextmanager
    def task(self, name: str, total: float | None = None) -> Iterator[Advance]:
        started = spoke = time.monotonic()
        done = 0.0

        def advance(units: float = 1) -> None:
            nonlocal done, spoke
            done += units
            now = time.monotonic()
            if now - spoke < self.every:
                return
            spoke = now
            if total and done:
                left = (now - started) / done * max(total - done, 0.0)
                self.note(f"  {name}: {done / total:.0%}, about {left:.0f} s left")
            else:
                self.note(f"  {name}: {done:g} done")

        self._names.append(name)
        try:
            yield advance
        finally:
            self._names.pop()
        if not self._names:
            self.note(f"{name}: {time.monotonic() - started:.1f} s")


class Bars:
    """Live bars with an estimate, through rich."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        self.console = Console(file=stream or sys.stderr)
        self._bars: Any = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
            transient=True,
        )
        self._depth = 0

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    @contextmanager
    def task(self, name: str, total: float | None = None) -> Iterator[Advance]:
        if self._depth == 0:
            self._bars.start()
        self._depth += 1
        started = time.monotonic()
        bar = self._bars.add_task(name, total=total)
        try:

            def advance(units: float = 1) -> None:
                self._bars.advance(bar, units)

            yield advance
            if self._depth == 1:
                self.note(f"{name}: {time.monotonic() - started:.1f} s")
        finally:
            self._bars.remove_task(bar)
            self._depth -= 1
            if self._depth == 0:
                self._bars.stop()


def default_progress(*, quiet: bool = False) -> Progress:
    """The right kind for where stderr goes."""
    if quiet:
        return Silent()
    return Bars() if sys.stderr.isatty() else Lines()
