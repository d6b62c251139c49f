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
    Digest,
    ForeignDevice,
    Ledger,
    Reading,
    TornCommit,
    accept,
    digest,
    format_ranges,
    parse_ranges,
    pieces,
)
from pipeline.saliency.exact import ExactSums, Grid, order

GRID = Grid({"a": [0]}, 40)


def commit(*units: int, name: str = "") -> Commit:
    """Unit u adds 10^u."""
    return Commit(units, rows=len(units), totals={"a": torch.tensor([sum(10**u for u in units)])}, name=name)


def total(reading: Reading) -> int:
    (sums,) = pieces(reading.accepted, GRID)
    return int(sums.totals["a"])


def read(ledger: Ledger) -> tuple[Reading, int]:
    """As a pass does: what is torn is left out."""
    while True:
        reading = ledger.coverage()
        try:
            (sums,) = ledger.pieces(reading, GRID)
            return reading, int(sums.totals.get("a", 0))
        except TornCommit:
            continue


@given(st.sets(st.integers(0, 2000)))
def test_ranges_come_back(units):
    assert parse_ranges(format_ranges(units)).tolist() == sorted(units)


def test_ranges_are_short():
    assert format_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


def test_commits_come_back_from_storage(tmp_path):
    ledger = Ledger(str(tmp_path), 3, "f")
    ledger.write(commit(0, 2))
    reading = ledger.coverage()
    assert (total(reading), reading.rows, reading.missing, reading.rejected) == (101, 2, [1], [])


def test_a_unit_in_two_commits_counts_once_and_what_fell_out_is_missing():
    reading = accept([commit(0, 1, name="x"), commit(1, 2, name="y"), commit(3, name="z")], 4)
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
    reading, found = read(ledger)
    assert (found, reading.missing, len(reading.rejected)) == (1, [1], 1)


def test_a_commit_whose_sums_are_broken_covers_by_its_header_and_is_left_out_by_the_reader(tmp_path):
    ledger = Ledger(str(tmp_path), 3, "f")
    path = tmp_path / ledger.write(commit(0, 1))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    later = ledger.write(commit(1, 2))  # was left out because of the broken one
    assert ledger.coverage().missing == [2]
    reading, found = read(ledger)
    assert (found, reading.missing) == (110, [0])
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
    reading = ledger.coverage()
    assert (reading.missing, len(reading.rejected)) == ([0, 1, 2, 3], 1)


def many() -> list[Commit]:
    """Sums of several shapes and strides, not all in every commit; unit u adds u + 1 to each."""
    names = {
        "b": (3, 2),
        "a": (),
        "a@2": (),
        "a#coarse": (),
        "a.b": (5,),
        "c/x": (4,),
        "c/x@2#coarse": (4,),
        "empty": (0,),
    }
    return [
        Commit((u,), 1, {n: torch.full(s, u + 1) for n, s in names.items() if u % 2 == 0 or "@" not in n})
        for u in range(4)
    ]


@pytest.mark.parametrize("size", [1, 40, 100, 1 << 20])
def test_sums_come_in_pieces_of_what_belongs_together(tmp_path, size):
    ledger = Ledger(str(tmp_path), 4, "f")
    for one in many():
        ledger.write(one)
    exponents = {name: [0] for name in ("a", "b", "a.b", "c/x", "empty")}
    stored, whole = ledger.coverage().accepted, ExactSums(Grid(exponents, 40))
    for one in many():
        whole.merge(one.totals)
    found = [piece.totals for piece in pieces(stored, whole.grid, size)]
    assert [name for piece in found for name in sorted(piece, key=order)] == [
        "a",
        "a#coarse",
        "a@2",
        "a.b",
        "b",
        "c/x",
        "c/x@2#coarse",
        "empty",
    ]
    assert {*found[0]} >= {"a", "a#coarse", "a@2"}
    assert len(found) == {1: 5, 40: 5, 100: 3, 1 << 20: 1}[size]
    state = Digest()
    for piece in found:
        state.update(piece)
        for name, total in piece.items():
            assert torch.equal(total, whole.totals[name])
    assert state.hex() == digest(whole.totals)


def test_parts_of_a_commit_are_read_and_checked_alone(tmp_path):
    ledger = Ledger(str(tmp_path), 1, "f")
    totals = {name: torch.arange(20_000) + i for i, name in enumerate("abcd")}
    path = tmp_path / ledger.write(Commit((0,), 1, totals))
    (commit,) = ledger.coverage().accepted
    assert {name: total.tolist() for name, total in commit.read({"a", "c"}).items()} == {
        name: totals[name].tolist() for name in "ac"
    }
    content = path.read_bytes()
    at = content.index(totals["d"].numpy().tobytes())  # a bit of d flips
    path.write_bytes(content[: at + 8] + bytes([content[at + 8] ^ 1]) + content[at + 9 :])
    assert {*commit.read({"a"})} == {"a"}
    with pytest.raises(TornCommit, match="checksums"):
        commit.read({"d"})
    path.write_bytes(content[:-8])
    with pytest.raises(TornCommit, match="shorter"):
        commit.read({"a"})


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
    assert ledger.coverage().missing == [0]


def test_a_commit_of_another_run_is_refused_with_both_fingerprints(tmp_path):
    Ledger(str(tmp_path), 1, "aaaa").write(commit(0))
    with pytest.raises(StaleArtifact, match=r"aaaa.*bbbb"):
        Ledger(str(tmp_path), 1, "bbbb").coverage()


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
    assert accept([commit(5, name="x")], 2).rejected == ["x: names units outside 0..1"]


def test_the_digest_sees_names_shapes_and_values():
    one = {"a": torch.tensor([1, 2])}
    assert digest(one) != digest({"b": torch.tensor([1, 2])})
    assert digest(one) != digest({"a": torch.tensor([[1, 2]])})
    assert digest(one) != digest({"a": torch.tensor([1, 3])})
    assert digest(one) == digest({"a": torch.tensor([1, 2])})
