"""A saboteur with real signals: whatever is killed, stopped or torn, a pass has each row once and the bits of an undisturbed one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.faults import Outcome, Scene, call, prepare, run_alone, run_shuffled, story, write_rows

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="descriptors of processes are Linux's")


@pytest.fixture(scope="module")
def stage() -> Iterator[Executor]:
    """Fresh processes: this one may have threads of other tests, and what they hold would be held for ever after a fork."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=prepare) as executor:
        yield executor


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("faults") / "rows.parquet")


def test_stories_of_kills_stops_and_torn_commits_end_with_the_undisturbed_hash(stage: Executor, rows: Path):
    outcomes = list(stage.map(story, range(5), repeat(rows.parent)))
    total = sum(outcomes, start=Outcome())
    assert total.worker_kills + total.driver_kills >= 20, total.table()
    assert min(total.driver_kills, total.torn_commits, total.temporary_files, total.second_drivers) >= 1, total.table()
    assert min(total.stopped_past_the_lease, total.doubled_commits_left_out, total.rows_redone) >= 1, total.table()
    assert all(outcome.hashes_equal >= 2 for outcome in outcomes)


@pytest.mark.parametrize("weights", [False, True], ids=["channels", "channels and weights"])
def test_neither_the_order_of_units_nor_the_number_of_workers_changes_a_bit(
    stage: Executor, rows: Path, tmp_path: Path, weights: bool
):
    scene = Scene(rows, weights)
    alone = stage.submit(call, run_alone, scene, tmp_path / "alone")
    shuffled = [stage.submit(call, run_shuffled, scene, tmp_path / f"{n}", n, n) for n in (1, 2, 3, 4)]
    assert {(run.result().sha256, run.result().rows) for run in (alone, *shuffled)} == {(alone.result().sha256, 600)}
