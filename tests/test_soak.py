"""The soak of a whole cluster: what it holds against a run, and a short one with real deaths."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from pipeline.execution.ledger import Commit, Ledger
from tests.soak import passes, rows_redone, soak


def commit(run_dir: Path, *units: int) -> None:
    """Four rows a unit."""
    ledger = Ledger(str(run_dir / "units" / "score-0123456789ab"), num_units=6, fingerprint="one pass")
    ledger.write(Commit(units, 4 * len(units), {"sum": torch.zeros(3, dtype=torch.int64)}))


def test_rows_of_doubled_commits_are_redone_and_count_once(tmp_path: Path):
    for units in [(0, 1), (2, 3), (4, 5), (3,), (2, 3)]:
        commit(tmp_path, *units)
    (reading,) = passes(tmp_path).values()
    assert (reading.rows, reading.missing) == (24, [])
    assert rows_redone(tmp_path) == 12


def test_a_unit_without_a_commit_is_missed(tmp_path: Path):
    commit(tmp_path, 0, 1)
    commit(tmp_path, 3, 4, 5)
    assert passes(tmp_path)["score"].missing == [2]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3000)
def test_runs_on_a_cluster_where_workers_nodes_and_drivers_die_end_like_an_undisturbed_one(tmp_path: Path):
    outcome = soak(tmp_path, minutes=1.5, seed=0, every_s=15.0, num_undisturbed=1)
    assert outcome.hashes_equal == outcome.runs >= 1, outcome.table()
    assert min(outcome.workers_killed, outcome.nodes_killed, outcome.drivers_killed) >= 1, outcome.table()
    assert outcome.submitted_again_after_a_killed_driver >= 1, outcome.table()
    assert outcome.submitted_again_after_another_error == 0, outcome.table()
    assert sum(outcome.deaths_by_stage.values()) == outcome.deaths, outcome.table()
    shutil.rmtree(tmp_path)
