"""TensorBoard event files, made from a training's history while it grows: `tensorboard --logdir RUN`.

A training has one file, which only ever grows, since TensorBoard remembers how far it has read. Records that a restart takes back, because
the newest checkpoint is older than they are, are taken back in the file, too: by TensorBoard's own mark of a restart, from which on it
forgets later steps. What the file holds is read from itself, so that nothing but the history decides what comes next: a record is neither
lost nor doubled, whichever process writes and whenever it died.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from pipeline import artifacts
from pipeline.artifacts import StorageError

NAME = "events.out.tfevents.training"
VERSION = "brain.Event:2"  # from which on readers know marks of a restart
NO_FIGURES = {"step", "epoch", "rows", "seconds"}
Scalars = dict[str, float]


class EventFile:
    """The event file of one training, in a directory of its own.

    Args:
        directory: local path or URI. A local file is appended to; an object is written anew with the same beginning, which readers of
            object stores see as the same.
    """

    def __init__(self, directory: str, clock: Callable[[], float] = time.time) -> None:
        self.path = artifacts.join(directory, NAME)
        self._clock = clock
        self._data: bytes | None = None
        self._told: list[tuple[int, Scalars]] = []

    def write(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Make the file tell this history. Raises StorageError; the next call makes up for it."""
        if self._data is None:
            stored = artifacts.read_bytes(self.path) if artifacts.exists(self.path) else b""
            whole, self._told = _read(stored)
            self._data = stored[:whole]
        figures = [(int(record["step"]), _scalars(record)) for record in history]
        if figures == self._told:
            return
        same = next((i for i, pair in enumerate(zip(self._told, figures, strict=False)) if pair[0] != pair[1]), None)
        kept = min(len(self._told), len(figures)) if same is None else same
        now = self._clock()
        new = b"" if self._data else _framed(Event(wall_time=now, file_version=VERSION))
        if kept < len(self._told):
            restart = SessionLog(status=SessionLog.START)
            new += _framed(Event(wall_time=now, step=self._told[kept][0], session_log=restart))
        for record, (step, scalars) in zip(history[kept:], figures[kept:], strict=True):
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
            at = now - (history[-1]["seconds"] - record["seconds"])
            new += _framed(Event(wall_time=at, step=step, summary=Summary(value=values)))
        _append(self.path, self._data, new)
        self._data += new
        self._told = figures


def _scalars(record: Mapping[str, Any]) -> Scalars:
    """The figures of a record, as an event file keeps them: in single precision."""
    return {
        name: float(np.float32(value))
        for name, value in record.items()
        if name not in NO_FIGURES and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _framed(event: Event) -> bytes:
    """A record of a TFRecord file: length, its checksum, data, their checksum."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def _events(data: bytes) -> Iterator[tuple[Event, int]]:
    """The events of a file, each with the place where it ends, up to the first that is not whole."""
    start = 0
    while start + 16 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + 16 + length
        body = data[start + 12 : end - 4]
        if end > len(data) or struct.unpack_from("<I", data, end - 4)[0] != masked_crc32c(body):
            return
        yield Event.FromString(body), end
        start = end


def _read(data: bytes) -> tuple[int, list[tuple[int, Scalars]]]:
    """Bytes that are whole, and what a reader knows after them."""
    whole = 0
    told: list[tuple[int, Scalars]] = []
    for event, end in _events(data):
        whole = end
        if event.HasField("session_log"):
            told = [one for one in told if one[0] < event.step]
        elif event.HasField("summary"):
            told.append((int(event.step), {value.tag: value.simple_value for value in event.summary.value}))
    return whole, told


def _append(path: str, before: bytes, new: bytes) -> None:
    if artifacts.is_uri(path):
        artifacts.write_bytes(path, before + new)
        return
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "r+b" if os.path.exists(path) else "wb") as file:
            file.truncate(len(before))  # behind it is what a dying process has left of an event
            file.seek(len(before))
            file.write(new)
    except OSError as error:
        raise StorageError(error.errno, f"cannot write {path}: {error.strerror}") from error
