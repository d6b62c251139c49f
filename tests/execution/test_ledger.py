"""The ledger's rule: a unit counts once, whatever is on storage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.artifacts import StaleArtifact, StorageError
from pipeline.execution.ledger import (
    CHECKSUMS,
    Commit,
    ForeignDevice,
    Ledger,
    accept,
    digest,
    format_ranges,
    parse_ranges,
)
from pipeline.saliency.exact import Grid

GRID = Grid({"a": [0]}, 40)


def commit(*units: int, name: str = "") -> Commit:
    """Unit u adds 10^u."""
    return Commit(units, rows=len(units), totals={"a": torch.tensor([sum(10**u for u in units)])}, name=name)


def total(reading) -> int:
    return int(reading.sums.totals["a"])


@given(st.sets(st.integers(0, 2000)))
def test_ranges_come_back(units):
    assert parse_ranges(format_ranges(units)).tolist() == sorted(units)


def test_ranges_are_short():
    assert format_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


def test_commits_come_back_from_storage(tmp_path):
    ledger = Ledger(str(tmp_path), 3, "f")
    ledger.write(commit(0, 2))
    reading = ledger.read(GRID)
    assert (total(reading), reading.rows, reading.missing, reading.rejected) == (101, 2, [1], [])


def test_a_unit_in_two_commits_counts_once_and_what_fell_out_is_missing():
    reading = accept([commit(0, 1, name="x"), commit(1, 2, name="y"), commit(3, name="z")], 4, GRID)
    assert total(reading) == 1011
    assert reading.missing == [2]
    assert reading.rejected == ["y: units 1 count already in an earlier commit"]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:10], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1])]
)
def test_a_torn_commit_does_not_count(tmp_path, damage):
    ledger = Ledger(str(tmp_path), 2, "f")
    ledger.write(commit(0))
    path = tmp_path / ledger.write(commit(1))
    path.write_bytes(damage(path.read_bytes()))
    reading = ledger.read(GRID)
    assert (total(reading), reading.missing, len(reading.rejected)) == (1, [1], 1)


def test_a_commit_whose_sums_are_broken_covers_by_its_header_and_is_left_out_by_the_reader(tmp_path):
    ledger = Ledger(str(tmp_path), 3, "f")
    path = tmp_path / ledger.write(commit(0, 1))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    later = ledger.write(commit(1, 2))  # was left out because of the broken one
    assert ledger.coverage().missing == [2]
    reading = ledger.read(GRID)
    assert (total(reading), reading.missing) == (110, [0])
    assert [reason.split(":")[0] for reason in reading.rejected] == [path.name]
    assert later in {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b.replace(b'"units":"0-3"', b'"units":"0-1"'),  # would be counted twice
        lambda b: b"\xff" * 8 + b[8:],  # a header of 2^64 bytes
        lambda b: b.replace(b'"data_offsets":[0,8]', b'"data_offsets":[0]  '),
    ],
)
def test_a_header_that_is_not_as_it_was_written_is_torn(tmp_path, damage):
    ledger = Ledger(str(tmp_path), 4, "f")
    path = tmp_path / ledger.write(commit(0, 1, 2, 3))
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    reading = ledger.read(GRID)
    assert (reading.missing, len(reading.rejected)) == ([0, 1, 2, 3], 1)


def test_coverage_reads_no_sums(tmp_path):
    ledger = Ledger(str(tmp_path), 2, "f")
    big = Commit((1,), 1, {"a": torch.zeros(1 << 16, dtype=torch.int64)})
    ledger.write(big)
    assert ledger.coverage().missing == [0]
    assert ledger.coverage().sums is None


def test_a_commit_is_a_safetensors_file(tmp_path):
    totals = {"b/x": torch.tensor([[1, 2], [3, 4]]), "a": torch.tensor(5), "empty": torch.zeros(0, dtype=torch.int64)}
    name = Ledger(str(tmp_path), 1, "f").write(Commit((0,), 1, totals))
    found = load_file(tmp_path / name)
    assert len(found.pop(CHECKSUMS)) == 3
    assert {key: value.tolist() for key, value in found.items()} == {k: v.tolist() for k, v in totals.items()}


def test_a_header_longer_than_the_first_read_comes_back(tmp_path):
    ledger = Ledger(str(tmp_path), 20_000, "f")
    ledger.write(commit(*range(0, 12, 2)))
    ledger.write(Commit(range(1, 20_000, 2), 1, {"a": torch.tensor([1])}, name=""))
    assert ledger.coverage().commits == 2


def test_an_unfinished_write_is_not_seen(tmp_path):
    ledger = Ledger(str(tmp_path), 1, "f")
    (tmp_path / ".commit-000000000-x.safetensors.tmp-1").write_bytes(b"half")
    assert ledger.read(GRID).missing == [0]


def test_a_commit_of_another_run_is_refused_with_both_fingerprints(tmp_path):
    Ledger(str(tmp_path), 1, "aaaa").write(commit(0))
    with pytest.raises(StaleArtifact, match=r"aaaa.*bbbb"):
        Ledger(str(tmp_path), 1, "bbbb").read(GRID)


def test_a_worker_elsewhere_or_on_another_device_is_refused(tmp_path):
    ledger = Ledger(str(tmp_path / "shared"), 1, "aaaa")
    ledger.fix_grid(GRID, "H100")
    ledger.require_same_place("H100")
    with pytest.raises(ForeignDevice, match=r"began on 'H100', and .* has 'L4'"):
        ledger.require_same_place("L4")
    with pytest.raises(StorageError, match=r"is not the directory of the driver.*that all nodes share"):
        Ledger(str(tmp_path / "own disk"), 1, "aaaa").require_same_place("H100")


def test_the_grid_is_fixed_once_and_belongs_to_its_run(tmp_path):
    ledger = Ledger(str(tmp_path), 1, "aaaa")
    assert ledger.grid() is None
    ledger.fix_grid(GRID, "H100")
    assert ledger.grid() == GRID
    with pytest.raises(StaleArtifact):
        Ledger(str(tmp_path), 1, "bbbb").grid()


def test_units_outside_the_pass_are_left_out():
    assert accept([commit(5, name="x")], 2, GRID).rejected == ["x: names units outside 0..1"]


def test_the_digest_sees_names_shapes_and_values():
    one = {"a": torch.tensor([1, 2])}
    assert digest(one) != digest({"b": torch.tensor([1, 2])})
    assert digest(one) != digest({"a": torch.tensor([[1, 2]])})
    assert digest(one) != digest({"a": torch.tensor([1, 3])})
    assert digest(one) == digest({"a": torch.tensor([1, 2])})
