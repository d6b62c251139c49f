"""Progress of long stages: bars on a terminal, a plain line now and then where the output is a file, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar(Protocol):
    def update(self, done: int, **fields: float) -> None:
        """`done` of the total, from the start of the stage; fields are shown beside it."""


class _Silent:
    def update(self, done: int, **fields: float) -> None:
        del done, fields


class _Rate:
    """Units per second since the first update: what an earlier run had done does not count."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def of(self, done: int) -> float | None:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        started, before = self._first
        return (done - before) / (now - started) if done > before and now > started else None


class _Lines:
    """A line every `interval_s`, and one at the end."""

    def __init__(self, title: str, total: int, unit: str, stream: TextIO, interval_s: float) -> None:
        self.title, self.total, self.unit, self.stream, self.interval_s = title, total, unit, stream, interval_s
        self._rate = _Rate()
        self._last = time.monotonic()
        self._shown = -1

    def update(self, done: int, **fields: float) -> None:
        rate = self._rate.of(done)
        now = time.monotonic()
        if done == self._shown or (now - self._last < self.interval_s and done < self.total):
            return
        self._last, self._shown = now, done
        parts = [f"{self.title}: {done}/{self.total} {self.unit}"]
        if rate:
            parts.append(f"{rate:.1f} {self.unit}/s, {(self.total - done) / rate:.0f} s left")
        parts += [f"{name} {value:.4g}" for name, value in fields.items()]
        print(", ".join(parts), file=self.stream, flush=True)


class _Bars:
    def __init__(self, bars: Progress, title: str, total: int, unit: str) -> None:
        self._bars, self._unit = bars, unit
        self._task = bars.add_task(title, total=total, rate="", fields="")
        self._rate = _Rate()

    def update(self, done: int, **fields: float) -> None:
        rate = self._rate.of(done)
        shown = " ".join(f"{name} {value:.4g}" for name, value in fields.items())
        self._bars.update(self._task, completed=done, rate=f"{rate:.0f} {self._unit}/s" if rate else "", fields=shown)


@contextmanager
def progress(
    title: str, total: int, unit: str = "rows", *, quiet: bool = False, stream: TextIO | None = None, interval_s: float = 10.0
) -> Iterator[Bar]:
    """Show the progress of a stage on `stream` (stderr)."""
    stream = stream or sys.stderr
    if quiet:
        yield _Silent()
    elif not stream.isatty():
        yield _Lines(title, total, unit, stream, interval_s)
    else:
        columns = (
            TextColumn("{task.description:>24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[fields]}"),
        )
        with Progress(*columns, console=Console(file=stream)) as bars:
            yield _Bars(bars, title, total, unit)
