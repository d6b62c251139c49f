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
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import artifacts
from pipeline.pruning.plan import ranges
from pipeline.saliency.exact import ExactSums, Grid

SUFFIX = ".safetensors"
HEAD = 1 << 14
"""Bytes of a commit that are read at once to learn which units it holds; more only if its header is longer."""
CHECKSUMS = "~crc32"
"""int64 [sums]: in the order of their names, which all come before this one."""
READERS = 16
"""Headers that are read at the same time: on an object store each one is a wait of tens of milliseconds."""


def format_ranges(units: Iterable[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2,5`."""
    return ranges(sorted(units))


def parse_ranges(text: str) -> np.ndarray:
    """int64 [units] from the text of `format_ranges`."""
    pairs = [part.partition("-") for part in filter(None, text.split(","))]
    runs = [np.arange(int(first), int(last or first) + 1) for first, _, last in pairs]
    return np.concatenate(runs) if runs else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Commit:
    """Partial sums and the units inside them."""

    units: Sequence[int] | np.ndarray
    rows: int
    totals: Mapping[str, Tensor] = field(repr=False)
    """int64, on the run's grid."""
    bad_rows: tuple[dict[str, Any], ...] = ()
    name: str = ""

    def parts(self, fingerprint: str) -> Iterator[bytes | memoryview]:
        """The bytes of its file, a safetensors file: a header that tells all but the sums, the sums, and last their checksums, which
        a second thread works out while the sums are being written."""
        metadata = {
            "units": format_ranges(self.units),
            "rows": str(self.rows),
            "bad_rows": json.dumps(self.bad_rows),
            "fingerprint": fingerprint,
        }
        metadata["header_crc32"] = str(_header_crc32(metadata))
        checksums = torch.zeros(len(self.totals), dtype=torch.int64)
        parts = iter(artifacts.tensor_parts({**self.totals, CHECKSUMS: checksums}, metadata))
        yield next(parts)
        with ThreadPoolExecutor(1) as second:
            found = []
            for part in islice(parts, len(self.totals)):
                found.append(second.submit(zlib.crc32, part))
                yield part
            checksums.copy_(torch.tensor([one.result() for one in found], dtype=torch.int64))
        yield from parts


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, types and bits: the identity of exact sums, or of weights. Tensors may share memory."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        state.update(artifacts.tensor_bytes(tensor))
    return state.hexdigest()


class ForeignDevice(RuntimeError):
    """A worker's device gives other bits than those of the pass."""


class TornCommit(ValueError):
    """A commit file that is not whole."""

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(f"{name}: {cause}")
        self.name = name


@dataclass(frozen=True)
class StoredCommit:
    """A commit on storage: what its header says. Its sums are read when they are asked for."""

    path: str
    name: str
    size: int
    units: np.ndarray = field(repr=False)
    rows: int
    bad_rows: tuple[dict[str, Any], ...]
    fingerprint: str

    @classmethod
    def open(cls, path: str, name: str, size: int) -> StoredCommit:
        """Raises TornCommit if the file is shorter or longer than its header says."""
        try:
            with artifacts.open_file(path) as file:
                header, start = _header(file, size)
            metadata = header.pop("__metadata__")
            if _header_crc32(metadata) != int(metadata["header_crc32"]):
                raise ValueError("its header does not have the checksum that it names")
            whole = start + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
            if size != whole:
                raise ValueError(f"the file has {size} bytes, its header says {whole}")
            return cls(
                path=path,
                name=name,
                size=size,
                units=parse_ranges(metadata["units"]),
                rows=int(metadata["rows"]),
                bad_rows=tuple(json.loads(metadata["bad_rows"])),
                fingerprint=metadata["fingerprint"],
            )
        except (LookupError, TypeError, ValueError) as error:
            raise TornCommit(name, str(error)) from error

    @property
    def totals(self) -> dict[str, Tensor]:
        """Raises TornCommit if a byte is wrong."""
        found = {}
        with artifacts.open_file(self.path) as file:
            header, start = _header(file, self.size)
            del header["__metadata__"]
            crc32: dict[str, int] = {}
            for key, tensor in header.items():
                first, last = tensor["data_offsets"]
                file.seek(start + first)
                data = bytearray(file.read(last - first))
                crc32[key] = zlib.crc32(data)
                whole = torch.frombuffer(data, dtype=torch.int64) if data else torch.zeros(0, dtype=torch.int64)
                found[key] = whole.reshape(tensor["shape"])
        named = found.pop(CHECKSUMS)
        if named.tolist() != [crc32[key] for key in sorted(found)]:
            raise TornCommit(self.name, "its sums do not have the checksums that the file names")
        return found


def _header_crc32(metadata: Mapping[str, str]) -> int:
    """Of all that the header says of the commit, but this."""
    said = {key: value for key, value in metadata.items() if key != "header_crc32"}
    return zlib.crc32(json.dumps(said, sort_keys=True).encode())


def _header(file: Any, size: int) -> tuple[dict[str, Any], int]:
    """A safetensors header, and where the data begin."""
    head = file.read(HEAD)
    end = 8 + int.from_bytes(head[:8], "little")
    if not 8 < end <= size:
        raise ValueError("the file ends within its header")
    if end > len(head):
        head += file.read(end - len(head))
    header = json.loads(head[8:end])
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    return header, end


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
    def num_files(self) -> int:
        return self.commits + len(self.rejected)

    @property
    def missing(self) -> list[int]:
        return np.flatnonzero(~self.covered).tolist()


def accept(commits: Iterable[Commit | StoredCommit], num_units: int, grid: Grid | None) -> Reading:
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
        segments = {name: tuple(sizes) for name, sizes in stored["segments"].items()}
        return Grid(exponents=stored["exponents"], addend_bits=stored["addend_bits"], segments=segments)

    def fix_grid(self, grid: Grid, processor: str) -> None:
        """`processor`: kind of the device that worked out the pilot; every commit must come from one of that kind."""
        content = {**asdict(grid), "fingerprint": self.fingerprint, "processor": processor}
        artifacts.write_json(self._grid_path, content)

    def require_same_place(self, processor: str) -> None:
        """In a worker: it sees the driver's directory, and its device gives the bits of the others."""
        if not artifacts.exists(self._grid_path):
            raise artifacts.StorageError(
                f"{self.directory} on {socket.gethostname()} is not the directory of the driver: what the driver wrote there is missing. "
                "Choose a --run-dir on storage that all nodes share, such as NFS, s3:// or gs://."
            )
        first = artifacts.read_json(self._grid_path)["processor"]
        if processor != first:
            raise ForeignDevice(
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
        artifacts.write_parts(artifacts.join(self.directory, name), commit.parts(self.fingerprint))
        return name

    def coverage(self) -> Reading:
        """Which units count, from the headers of the commits: the sums stay where they are."""
        stored, torn = self._stored()
        reading = accept(stored, self.num_units, grid=None)
        reading.rejected += torn
        return reading

    def read(self, grid: Grid | None) -> Reading:
        """The accepted commits and, on a grid, their sums: in memory are the sums and one commit."""
        stored, torn = self._stored()
        while True:
            try:
                reading = accept(stored, self.num_units, grid)
            except (
                TornCommit
            ) as error:  # its header was whole, its sums are not: another one may now be accepted in its place
                stored = [commit for commit in stored if commit.name != error.name]
                torn.append(str(error))
                continue
            reading.rejected += torn
            return reading

    def _stored(self) -> tuple[list[StoredCommit], list[str]]:
        """Whole commits in the order of their names, and why others are not."""
        sizes = {
            name: size for name, size in artifacts.list_sizes(self.directory).items() if name.startswith("commit-")
        }

        def look(name: str) -> StoredCommit | TornCommit:
            try:
                return StoredCommit.open(artifacts.join(self.directory, name), name, sizes[name])
            except TornCommit as error:
                return error

        with ThreadPoolExecutor(READERS) as readers:
            found = list(readers.map(look, sizes))
        whole = [commit for commit in found if isinstance(commit, StoredCommit)]
        for commit in whole:
            self._require_own(commit.fingerprint, commit.path)
        return whole, [str(error) for error in found if isinstance(error, TornCommit)]
