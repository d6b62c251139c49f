"""Event files: what TensorBoard's own reader finds in them, while a training runs, dies, and goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from pipeline import artifacts
from pipeline.report.events import NAME, EventFile


def record(step: int, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    whole = {"step": step, "epoch": 0, "loss": loss, "lr": 0.1, "rows": 8, "seconds": 2.0 * step, "rows_per_s": 4.0}
    return {**whole, **more}


def write(directory: Path, history: Sequence[dict[str, Any]]) -> bytes:
    """By a process that knows nothing of what was written before."""
    EventFile(str(directory), clock=lambda: 1000.0).write(history)
    return (directory / NAME).read_bytes()


def read(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory)).Reload()


def losses(directory: Path) -> list[tuple[int, float]]:
    return [(one.step, one.value) for one in read(directory).Scalars("loss")]


def test_a_history_is_read_back_with_what_policies_say_and_its_times(tmp_path: Path):
    history = [
        record(10, 2.0, zeros=0.25, remains=0.75),
        record(20, 1.5, zeros=0.5, remains=0.5, layers={"conv.weight": [0.5, 0.6]}),
    ]
    write(tmp_path, history)
    found = read(tmp_path)
    assert set(found.Tags()["scalars"]) == {"loss", "lr", "rows_per_s", "zeros", "remains"}
    assert [(one.step, one.value, one.wall_time) for one in found.Scalars("zeros")] == [
        (10, 0.25, 980.0),
        (20, 0.5, 1000.0),
    ]
    assert losses(tmp_path) == [(10, 2.0), (20, 1.5)]


def test_a_growing_history_appends(tmp_path: Path):
    first = write(tmp_path, [record(10)])
    inode = (tmp_path / NAME).stat().st_ino
    second = write(tmp_path, [record(10), record(20)])
    assert second.startswith(first)
    assert len(second) > len(first)
    assert (tmp_path / NAME).stat().st_ino == inode  # a reader has the file open
    assert write(tmp_path, [record(10), record(20)]) == second


def test_a_reader_that_is_open_sees_what_comes(tmp_path: Path):
    events = EventFile(str(tmp_path))
    events.write([record(10)])
    reader = EventAccumulator(str(tmp_path)).Reload()
    events.write([record(10), record(20, 0.5)])
    assert [one.value for one in reader.Reload().Scalars("loss")] == [1.0, 0.5]


def test_steps_that_a_restart_repeats_are_told_once(tmp_path: Path):
    history = [record(step, 1.0 / step) for step in (10, 20, 30, 40)]
    before = write(tmp_path, history)
    reader = EventAccumulator(str(tmp_path)).Reload()
    again = [record(30, 1 / 30, rows_per_s=5.0), record(40, 1 / 40, rows_per_s=5.0), record(50, 1 / 50)]
    assert write(tmp_path, [*history[:2], again[0]]).startswith(before)
    write(tmp_path, [*history[:2], *again])
    for found in (read(tmp_path), reader.Reload()):  # one that reads it all, one that has been there before the restart
        assert [(one.step, one.value) for one in found.Scalars("rows_per_s")] == [
            (10, 4.0),
            (20, 4.0),
            (30, 5.0),
            (40, 5.0),
            (50, 4.0),
        ]
        assert [one.step for one in found.Scalars("loss")] == [10, 20, 30, 40, 50]


def test_a_training_that_begins_anew_replaces_the_one_before(tmp_path: Path):
    write(tmp_path, [record(10), record(20), record(30)])
    write(tmp_path, [record(7, 3.0)])
    assert losses(tmp_path) == [(7, 3.0)]


@pytest.mark.parametrize("torn", [1, 11, 30])
def test_an_event_that_was_cut_off_is_written_again(tmp_path: Path, torn: int):
    whole = write(tmp_path, [record(10), record(20, 0.5)])
    (tmp_path / NAME).write_bytes(whole[:-torn])
    assert write(tmp_path, [record(10), record(20, 0.5)]) == whole
    assert len([*EventFileLoader(str(tmp_path / NAME)).Load()]) == 3  # the file's version, and two records


def test_an_object_store_sees_the_same_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store: dict[str, bytes] = {}
    monkeypatch.setattr(artifacts, "exists", lambda path: path in store)
    monkeypatch.setattr(artifacts, "read_bytes", lambda path: store[path])
    monkeypatch.setattr(artifacts, "write_bytes", lambda path, data: store.update({path: data}))
    path, events = f"s3://bucket/run/{NAME}?region=eu-west-1", EventFile("s3://bucket/run?region=eu-west-1")
    events.write([record(10)])
    first = store[path]
    events.write([record(10), record(20)])
    EventFile("s3://bucket/run?region=eu-west-1").write([record(10), record(20), record(30)])
    assert store[path].startswith(first)
    (tmp_path / NAME).write_bytes(store[path])
    assert losses(tmp_path) == [(10, 1.0), (20, 1.0), (30, 1.0)]
