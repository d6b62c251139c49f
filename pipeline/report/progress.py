"""Progress of long stages: bars on a terminal, a plain line now and then in a file, nothing when quiet; and a sign of life on storage."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pipeline import artifacts
from pipeline.report.text import duration, rate

Clock = Callable[[], float]
FIRST_AFTER_S = 2.0
"""A line comes with the first progress that there is after this time: it tells how fast a stage is, also one that is soon over."""
BEAT_EVERY_S = 20.0


class Bar(Protocol):
    def update(self, done: int, **fields: float) -> None:
        """`done` of the total, from the start of the stage; fields are shown beside it."""


class _Silent:
    def update(self, done: int, **fields: float) -> None:
        del done, fields


class _Pace:
    """Units per second since the first update: what an earlier run had done does not count."""

    def __init__(self, total: int, unit: str, clock: Clock) -> None:
        self._total, self._unit, self._clock = total, unit, clock
        self._first: tuple[float, int] | None = None

    def words(self, done: int) -> list[str]:
        """Rate and time left, as far as they are known."""
        now = self._clock()
        if self._first is None:
            self._first = (now, done)
        started, before = self._first
        if done <= before or now <= started:
            return []
        per_s = (done - before) / (now - started)
        left = [f"{duration((self._total - done) / per_s)} left"] if done < self._total else []
        return [rate(per_s, self._unit), *left]


class _Lines:
    """A line when a stage begins, one with its first progress, then one every `interval_s`, and one for the last state."""

    def __init__(self, title: str, total: int, unit: str, stream: TextIO, interval_s: float, clock: Clock) -> None:
        self.title, self.total, self.unit, self.stream = title, total, unit, stream
        self.interval_s, self._clock = interval_s, clock
        self._pace = _Pace(total, unit, clock)
        self._last = self._began = clock()
        self._first: int | None = None
        self._state: tuple[int, list[str]] | None = None
        self._shown: int | None = None

    def update(self, done: int, **fields: float) -> None:
        self._state = (done, [*self._pace.words(done), *_named(fields)])
        now = self._clock()
        begins = self._first is None
        moves = self._shown == self._first and now - self._began >= FIRST_AFTER_S
        self._first = done if self._first is None else self._first
        if begins or moves or now - self._last >= self.interval_s or done >= self.total:
            self.flush()

    def flush(self) -> None:
        if self._state is None or self._state[0] == self._shown:
            return
        done, words = self._state
        self._last, self._shown = self._clock(), done
        print(", ".join([f"{self.title}: {done:,}/{self.total:,} {self.unit}", *words]), file=self.stream, flush=True)


class _Bars:
    def __init__(self, bars: Progress, title: str, total: int, unit: str) -> None:
        self._bars = bars
        self._task = bars.add_task(escape(title), total=total, words="")
        self._pace = _Pace(total, unit, time.monotonic)

    def update(self, done: int, **fields: float) -> None:
        self._bars.update(self._task, completed=done, words="  ".join([*self._pace.words(done), *_named(fields)]))


def _named(fields: dict[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in fields.items()]


def _can_redraw(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "dumb") not in {"dumb", "unknown"}


@contextmanager
def progress(
    title: str,
    total: int,
    unit: str = "rows",
    *,
    quiet: bool = False,
    stream: TextIO | None = None,
    interval_s: float = 10.0,
    clock: Clock = time.monotonic,
) -> Iterator[Bar]:
    """Show the progress of a stage on `stream` (stderr); its last state is shown also when the stage ends early."""
    stream = stream or sys.stderr
    if quiet:
        yield _Silent()
    elif not _can_redraw(stream):
        lines = _Lines(title, total, unit, stream, interval_s, clock)
        try:
            yield lines
        finally:
            lines.flush()
    else:
        columns = (
            TextColumn("{task.description:>24}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}", markup=False),
        )
        with Progress(*columns, console=Console(file=stream)) as bars:
            yield _Bars(bars, title, total, unit)


@contextmanager
def alive(path: str, every_s: float = BEAT_EVERY_S, clock: Clock = time.time) -> Iterator[None]:
    """While inside, a thread writes now and then to `path` that this process is there: who looks from elsewhere cannot see it."""
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(path, every_s, clock, stop), name="sign of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _beat(path: str, every_s: float, clock: Clock, stop: threading.Event) -> None:
    while not stop.wait(every_s):
        try:
            artifacts.write_json(path, {"time": clock(), "host": socket.gethostname(), "pid": os.getpid()})
        except artifacts.StorageError as error:  # the stage itself will say so, if it matters
            logging.getLogger(__name__).warning("no sign of life is written: %s", error)
