"""The ledger: which units count. Its only truth are the commits on storage.

A commit is one file that holds partial sums *and* the ids of the units inside them, so that no crash can part the two. A unit counts
when an accepted commit names it. Acceptance is a rule for the reader, not an agreement between processes: commits are taken in the
order of their names as long as they are whole and share no unit with one taken before. A torn file, a late commit of a worker that
was believed dead, a unit done twice: each is left out by the same rule, and units that nobody accepted are simply done again.
Because the sums are exact (saliency/exact.py), which of two commits is taken cannot change a bit of the result.
"""

from __future__ import annotations

import hashlib
import json
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from pipeline import artifacts
from pipeline.saliency.exact import ExactSums, Grid

SUFFIX = ".safetensors"


def format_ranges(units: Iterable[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2,5`."""
    parts: list[str] = []
    start = last = None
    for unit in sorted(units):
        if last is not None and unit == last + 1:
            last = unit
            continue
        if start is not None:
            parts.append(f"{start}-{last}" if last != start else f"{start}")
        start = last = unit
    if start is not None:
        parts.append(f"{start}-{last}" if last != start else f"{start}")
    return ",".join(parts)


def parse_ranges(text: str) -> list[int]:
    units: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        units.extend(range(int(first), int(last or first) + 1))
    return units


@dataclass(frozen=True)
class Commit:
    """Partial sums and the units inside them."""

    units: tuple[int, ...]
    rows: int
    totals: Mapping[str, Tensor] = field(repr=False)
    """int64, on the run's grid."""
    bad_rows: tuple[dict[str, Any], ...] = ()
    name: str = ""

    def to_bytes(self, fingerprint: str) -> bytes:
        metadata = {
            "units": format_ranges(self.units),
            "rows": str(self.rows),
            "bad_rows": json.dumps(self.bad_rows),
            "fingerprint": fingerprint,
            "digest": digest(self.totals),
        }
        return save_safetensors({name: tensor.contiguous() for name, tensor in self.totals.items()}, metadata)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, types and bits: the identity of exact sums, or of weights. Tensors may share memory."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


class TornCommit(ValueError):
    """A commit file that is not whole."""


def parse_commit(data: bytes, name: str) -> tuple[Commit, str]:
    """A commit and its fingerprint from the bytes of its file; TornCommit if a byte is missing or wrong."""
    try:
        totals = load_safetensors(data)
        header_size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + header_size])["__metadata__"]
        if digest(totals) != metadata["digest"]:
            raise TornCommit(f"{name}: the sums do not have the digest that the file names")
        commit = Commit(
            units=tuple(parse_ranges(metadata["units"])),
            rows=int(metadata["rows"]),
            totals=totals,
            bad_rows=tuple(json.loads(metadata["bad_rows"])),
            name=name,
        )
        return commit, metadata["fingerprint"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise TornCommit(f"{name}: {error}") from error


@dataclass
class Reading:
    """What the accepted commits add up to."""

    covered: np.ndarray
    """bool [num_units]: units that count."""
    sums: ExactSums | None
    rows: int = 0
    bad_rows: list[dict[str, Any]] = field(default_factory=list)
    commits: int = 0
    rejected: list[str] = field(default_factory=list)
    """Files left out, each with its reason."""

    @property
    def missing(self) -> list[int]:
        return np.flatnonzero(~self.covered).tolist()


def accept(commits: Iterable[Commit], num_units: int, grid: Grid | None) -> Reading:
    """Take commits in the given order as long as they share no unit with one taken before."""
    reading = Reading(np.zeros(num_units, dtype=bool), ExactSums(grid) if grid else None)
    for commit in commits:
        ids = np.asarray(commit.units, dtype=np.int64)
        if ids.size == 0 or ids.min() < 0 or ids.max() >= num_units:
            reading.rejected.append(f"{commit.name}: names units outside 0..{num_units - 1}")
        elif reading.covered[ids].any():
            twice = format_ranges(ids[reading.covered[ids]].tolist())
            reading.rejected.append(f"{commit.name}: units {twice} count already in an earlier commit")
        else:
            reading.covered[ids] = True
            reading.rows += commit.rows
            reading.bad_rows.extend(commit.bad_rows)
            reading.commits += 1
            if reading.sums is not None:
                reading.sums.merge(commit.totals)
    return reading


class Ledger:
    """The commits of one pass over the data, in one directory.

    Args:
        directory: place of the commits and of the grid; local path or URI.
        num_units: units of the pass.
        fingerprint: of everything that the sums are made from; commits of another one are refused.
    """

    def __init__(self, directory: str, num_units: int, fingerprint: str) -> None:
        self.directory = directory
        self.num_units = num_units
        self.fingerprint = fingerprint

    # Grid -----------------------------------------------------------------------------------------------------------

    @property
    def _grid_path(self) -> str:
        return artifacts.join(self.directory, "grid.json")

    def grid(self) -> Grid | None:
        if not artifacts.exists(self._grid_path):
            return None
        stored = artifacts.read_json(self._grid_path)
        self._require_own(stored["fingerprint"], self._grid_path)
        return Grid(exponents=stored["exponents"], addend_bits=stored["addend_bits"])

    def fix_grid(self, grid: Grid, processor: str) -> None:
        """`processor`: kind of the device that worked out the pilot; every commit must come from one of that kind."""
        content = {"exponents": grid.exponents, "addend_bits": grid.addend_bits, "fingerprint": self.fingerprint}
        artifacts.write_json(self._grid_path, {**content, "processor": processor})

    def require_same_place(self, processor: str) -> None:
        """In a worker: it sees the driver's directory, and its device gives the bits of the others."""
        if not artifacts.exists(self._grid_path):
            raise artifacts.StorageError(
                f"{self.directory} on {socket.gethostname()} is not the directory of the driver: what the driver wrote there is missing. "
                "Choose a --run-dir on storage that all nodes share, such as NFS, s3:// or gs://."
            )
        first = artifacts.read_json(self._grid_path)["processor"]
        if processor != first:
            raise ValueError(
                f"this pass began on '{first}', and {socket.gethostname()} has '{processor}': floating point differs between the two, so "
                "their sums do not belong together. Use nodes of one kind, or another --run-dir."
            )

    def _require_own(self, fingerprint: str, path: str) -> None:
        if fingerprint != self.fingerprint:
            raise artifacts.StaleArtifact(
                f"{path} belongs to {artifacts.short(fingerprint)}, this run is {artifacts.short(self.fingerprint)}. "
                "Use another --run-dir, or the first run's values."
            )

    # Commits --------------------------------------------------------------------------------------------------------

    def write(self, commit: Commit) -> str:
        """Put a commit on storage; from here on its units count. Returns its name."""
        name = f"commit-{min(commit.units):09d}-{uuid.uuid4().hex[:12]}{SUFFIX}"
        artifacts.write_bytes(artifacts.join(self.directory, name), commit.to_bytes(self.fingerprint))
        return name

    def read(self, grid: Grid | None) -> Reading:
        """Read all commits and apply the rule of acceptance. With grid=None only coverage is read, not the sums."""
        torn: list[str] = []
        reading = accept(self._commits(torn), self.num_units, grid)
        reading.rejected += torn
        return reading

    def _commits(self, torn: list[str]) -> Iterator[Commit]:
        names: Sequence[str] = [name for name in artifacts.list_dir(self.directory) if name.startswith("commit-")]
        for name in names:
            path = artifacts.join(self.directory, name)
            try:
                commit, fingerprint = parse_commit(artifacts.read_bytes(path), name)
            except TornCommit as error:
                torn.append(str(error))
                continue
            self._require_own(fingerprint, path)
            yield commit
