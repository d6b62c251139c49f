"""One pass over the data in this process: every row once, resumed, torn, and ended early by too many bad rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.data.batches import Decoder
from pipeline.data.rows import open_source
from pipeline.data.units import Units
from pipeline.execution.coordinator import Done
from pipeline.execution.drive import LocalPool, PassFailed, PassResult, run_pass
from pipeline.execution.ledger import Ledger
from pipeline.execution.worker import Pass
from pipeline.models.task import Task
from pipeline.models.trace import propagate
from pipeline.saliency.statistics import GateStatistics
from tests.data.making import image, write_parquet


class Brightness(Task):
    """Rows, and the sum of their red values."""

    nested = frozenset({"red", "rows"})

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
        return {"rows": torch.tensor(len(labels_N)), "red": images_NCHW[:, 0].double().mean((1, 2)).sum()}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "rows.parquet", [image(i) for i in range(40)], [i % 10 for i in range(40)])


def pass_over(
    rows: Path, directory: Path, pool: LocalPool | None = None, task: Task | None = None, **options: Any
) -> PassResult:
    source = open_source(str(rows))
    units = Units(source.row_groups, 4)
    work = Pass(
        task=task or Brightness(),
        source=source,
        units=units,
        decoder=Decoder(12, (0, 0, 0), (1, 1, 1), "bilinear", 1.0),
        ledger=Ledger(str(directory), len(units), "fingerprint"),
        grid=None,
        micro_batch=4,
        num_classes=10,
        on_bad_row="skip",
    )
    return run_pass(work, pool or LocalPool(), commit_interval_s=0.0, **options)


def commits(directory: Path) -> list[Path]:
    return sorted(directory.glob("commit-*"))


def test_every_row_counts_once(rows: Path, tmp_path: Path):
    result = pass_over(rows, tmp_path / "units")
    assert (result.rows, result.values["rows"].item(), result.resumed_units) == (40, 40, 0)
    assert result.values["red"].item() == pytest.approx(sum(range(40)) / 255, rel=1e-5)


def test_a_pass_may_be_run_twice_with_one_task(rows: Path, tmp_path: Path):
    torch.manual_seed(0)
    tail = (nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *tail).eval()
    task = GateStatistics(model, propagate(model, torch.zeros(1, 3, 12, 12)), weights=True)
    results = [pass_over(rows, tmp_path / name, task=task) for name in ("a", "b")]
    assert results[0].sha256 == results[1].sha256
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_a_pass_goes_on_from_its_commits_and_does_torn_ones_again(rows: Path, tmp_path: Path):
    whole = pass_over(rows, tmp_path / "units")
    first, second, *_ = commits(tmp_path / "units")
    first.unlink()
    os.truncate(second, second.stat().st_size - 3)
    again = pass_over(rows, tmp_path / "units")
    assert (again.sha256, again.rows) == (whole.sha256, 40)
    assert 0 < again.resumed_units < again.units
    assert [reason.split(":")[0] for reason in again.rejected_commits] == [second.name]


def test_a_commit_that_is_torn_while_the_pass_runs_is_done_again_at_its_end(rows: Path, tmp_path: Path):
    whole = pass_over(rows, tmp_path / "whole")
    torn: list[Path] = []

    def tear_the_third(rows_done: int) -> None:
        if len(found := commits(tmp_path / "units")) == 3 and not torn:
            torn.append(found[2])
            os.truncate(found[2], found[2].stat().st_size - 3)

    again = pass_over(rows, tmp_path / "units", on_progress=tear_the_third)
    assert len(torn) == 1
    assert (again.sha256, again.rows, again.resumed_units) == (whole.sha256, 40, 0)


def test_sums_that_break_after_the_pass_are_done_again_by_the_next_start(rows: Path, tmp_path: Path):
    whole = pass_over(rows, tmp_path / "units")
    path = commits(tmp_path / "units")[1]
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    again = pass_over(rows, tmp_path / "units")
    assert (again.sha256, again.rows) == (whole.sha256, 40)


def test_a_sample_is_the_same_whatever_else_the_ledger_holds(rows: Path, tmp_path: Path):
    fresh = pass_over(rows, tmp_path / "fresh", stride=4)  # units 0, 4 and 8 of 10, of 4 rows each
    assert (fresh.rows, fresh.units, fresh.values["rows"].item()) == (12, 3, 12)
    assert fresh.values["red"].item() == pytest.approx(sum([*range(4), *range(16, 20), *range(32, 36)]) / 255, rel=1e-5)
    whole = pass_over(rows, tmp_path / "fresh")
    again = pass_over(rows, tmp_path / "fresh", stride=4)
    assert (whole.rows, whole.sha256) == (40, pass_over(rows, tmp_path / "other").sha256)
    assert (again.rows, again.sha256) == (12, fresh.sha256)


class Forgetful(LocalPool):
    """Says that it has committed, and has not."""

    def events(self, timeout_s: float) -> list:
        if self._lease is None:
            return super().events(timeout_s)
        (lease, _), self._lease = self._lease, None
        return [Done("local", lease, 0.0)]


def test_commits_that_nobody_finds_end_the_pass(rows: Path, tmp_path: Path):
    with pytest.raises(PassFailed, match=r"nothing new is there. Is --run-dir on storage that all nodes share"):
        pass_over(rows, tmp_path / "units", pool=Forgetful())


def test_too_many_bad_rows_end_the_pass_before_its_end(tmp_path: Path):
    images = [b"only words" if i < 10 else image(i) for i in range(200)]
    rows = write_parquet(tmp_path / "rows.parquet", images, [0] * 200)
    with pytest.raises(PassFailed, match=r"\d+ rows are bad, more than the 4 that data\.max_bad_fraction allows"):
        pass_over(rows, tmp_path / "units", max_bad_fraction=0.02)
    assert len(commits(tmp_path / "units")) < 25
    assert pass_over(rows, tmp_path / "units", max_bad_fraction=0.05).rows == 190
