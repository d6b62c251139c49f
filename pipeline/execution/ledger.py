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
import math
import socket
import uuid
import zlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import artifacts
from pipeline.pruning.plan import ranges
from pipeline.saliency.exact import ExactSums, Grid, base, order

SUFFIX = ".safetensors"
HEAD = 1 << 14
"""Bytes of a commit that are read at once to learn which units it holds; more only if its header is longer."""
CHECKSUMS = "~crc32"
"""int64 [sums]: in the order of their names, which all come before this one."""
READERS = 16
"""Headers that are read at the same time: on an object store each one is a wait of tens of milliseconds."""
PIECE = 1 << 28
"""Bytes of sums that are added up at a time."""
GAP = 1 << 16
"""Bytes between two ranges of a file that are read with them: cheaper than another request."""


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

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(total.shape) for name, total in self.totals.items()}

    def total(self, name: str) -> Tensor:
        """One of the sums, on the CPU or a GPU; asked for once each, in the order of the names."""
        return self.totals[name]

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        return {name: total for name, total in self.totals.items() if name in names}

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
        shapes = self.shapes
        about = {name: torch.empty(shapes[name], dtype=torch.int64, device="meta") for name in sorted(shapes)}
        checksums = torch.zeros(len(about), dtype=torch.int64)
        tensors = chain(((name, self.total(name)) for name in about), [(CHECKSUMS, checksums)])
        parts = artifacts.streamed_tensors({**about, CHECKSUMS: checksums}, tensors, metadata)
        yield next(parts)
        with ThreadPoolExecutor(1) as second:
            found = []
            for part in islice(parts, len(about)):
                found.append(second.submit(zlib.crc32, part))
                yield part
                if len(found) > 1:
                    found[-2].result()  # two wait at most: each may be the only copy of a tensor
            checksums.copy_(torch.tensor([one.result() for one in found], dtype=torch.int64))
        yield from parts


class Digest:
    """sha256 over names, shapes, types and bits: the identity of exact sums, or of weights. Tensors may share memory."""

    def __init__(self) -> None:
        self._state = hashlib.sha256()

    def update(self, tensors: Mapping[str, Tensor]) -> None:
        for name in sorted(tensors, key=order):
            tensor = tensors[name]
            self._state.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
            self._state.update(artifacts.tensor_bytes(tensor))

    def hex(self) -> str:
        return self._state.hexdigest()


def digest(tensors: Mapping[str, Tensor]) -> str:
    state = Digest()
    state.update(tensors)
    return state.hex()


class ForeignDevice(RuntimeError):
    """A worker's device gives other bits than those of the pass."""


class TornCommit(ValueError):
    """A commit file that is not whole."""

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(f"{name}: {cause}")
        self.name = name


@dataclass(frozen=True)
class Layout:
    """What a commit holds, in the order in which it lies in the file; commits that hold the same share it."""

    shapes: dict[str, tuple[int, ...]]
    starts: dict[str, int]
    """Bytes from the first sum to each one; of the checksums, too."""
    size: int

    @classmethod
    def of(cls, header: Mapping[str, Mapping[str, Any]]) -> Layout:
        """Raises ValueError if tensors overlap, leave gaps or are no int64."""
        starts, end = {}, 0
        for name in sorted(header):
            starts[name], shape = end, header[name]["shape"]
            end += 8 * math.prod(shape)
            if header[name]["dtype"] != "I64" or header[name]["data_offsets"] != [starts[name], end]:
                raise ValueError(f"{name} does not lie where it was written")
        shapes = {name: tuple(header[name]["shape"]) for name in starts}
        if shapes.pop(CHECKSUMS, None) != (len(shapes),):
            raise ValueError("it has no checksums")
        return cls(shapes, starts, end)


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
    layout: Layout = field(repr=False)

    @classmethod
    def open(cls, path: str, name: str, size: int) -> StoredCommit:
        """Raises TornCommit if the file is shorter or longer than its header says."""
        try:
            with artifacts.open_file(path) as file:
                header, start = _header(file, size)
            metadata = header.pop("__metadata__")
            if _header_crc32(metadata) != int(metadata["header_crc32"]):
                raise ValueError("its header does not have the checksum that it names")
            layout = Layout.of(header)
            if size != start + layout.size:
                raise ValueError(f"the file has {size} bytes, its header says {start + layout.size}")
            return cls(
                path=path,
                name=name,
                size=size,
                units=parse_ranges(metadata["units"]),
                rows=int(metadata["rows"]),
                bad_rows=tuple(json.loads(metadata["bad_rows"])),
                fingerprint=metadata["fingerprint"],
                layout=layout,
            )
        except (LookupError, TypeError, ValueError) as error:
            raise TornCommit(name, str(error)) from error

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.layout.shapes

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Those of its sums that have such a name, each checked. Raises TornCommit if a byte is wrong."""
        wanted = [name for name in self.layout.starts if name in names or name == CHECKSUMS]
        found: dict[str, Tensor] = {}
        with artifacts.open_file(self.path) as file:
            for run in self._runs(wanted):
                first = self.layout.starts[run[0]]
                file.seek(self.size - self.layout.size + first)
                data = bytearray(file.read(self._end(run[-1]) - first))
                if len(data) != self._end(run[-1]) - first:
                    raise TornCommit(self.name, "the file has become shorter since its header was read")
                for name in run:
                    part = memoryview(data)[self.layout.starts[name] - first : self._end(name) - first]
                    whole = torch.frombuffer(part, dtype=torch.int64) if part else torch.zeros(0, dtype=torch.int64)
                    found[name] = whole.reshape(self.layout.shapes.get(name, (-1,)))
        named = dict(zip(self.layout.shapes, found.pop(CHECKSUMS).tolist(), strict=True))
        if any(named[name] != zlib.crc32(artifacts.tensor_bytes(total)) for name, total in found.items()):
            raise TornCommit(self.name, "its sums do not have the checksums that the file names")
        return found

    def _end(self, name: str) -> int:
        return self.layout.starts[name] + 8 * math.prod(self.layout.shapes.get(name, (len(self.layout.shapes),)))

    def _runs(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Names whose sums lie side by side, or nearly so: each run is one request."""
        run: list[str] = []
        for name in names:
            if run and self.layout.starts[name] - self._end(run[-1]) > GAP:
                yield run
                run = []
            run.append(name)
        if run:
            yield run


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
    """Which commits count, and which units by them."""

    covered: np.ndarray
    """bool [num_units]: units that count."""
    accepted: list[Commit | StoredCommit] = field(default_factory=list)
    rows: int = 0
    bad_rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    """Files left out, each with its reason."""

    @property
    def commits(self) -> int:
        return len(self.accepted)

    @property
    def num_files(self) -> int:
        return self.commits + len(self.rejected)

    @property
    def missing(self) -> list[int]:
        return np.flatnonzero(~self.covered).tolist()


def accept(commits: Iterable[Commit | StoredCommit], num_units: int) -> Reading:
    """Take commits in the given order as long as they share no unit with one taken before."""
    reading = Reading(np.zeros(num_units, dtype=bool))
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
            reading.accepted.append(commit)
    return reading


def shapes_of(commits: Iterable[Commit | StoredCommit]) -> dict[str, tuple[int, ...]]:
    """Of all sums that any of the commits has, in the order in which `pieces` come to them."""
    found = {name: shape for commit in commits for name, shape in commit.shapes.items()}
    return {name: found[name] for name in sorted(found, key=order)}


def pieces(commits: Sequence[Commit | StoredCommit], grid: Grid, size: int = PIECE) -> Iterator[ExactSums]:
    """The sums over all commits, about `size` bytes at a time: those of a network's weights need not fit into memory at once.

    What makes up one value comes in one piece.

    Raises:
        TornCommit: the sums of a commit are not those that were written.
    """
    names: list[str] = []
    held = 0
    for name, shape in shapes_of(commits).items():
        needed = 8 * math.prod(shape)
        if names and held + needed > size and base(name) != base(names[-1]):
            yield _piece(commits, grid, names, depth=max(1, min(READERS, size // max(held, 1))))
            names, held = [], 0
        names.append(name)
        held += needed
    yield _piece(commits, grid, names, depth=max(1, min(READERS, size // max(held, 1))))


def _piece(commits: Iterable[Commit | StoredCommit], grid: Grid, names: Sequence[str], depth: int) -> ExactSums:
    sums = ExactSums(grid)
    for totals in _read_ahead(commits, frozenset(names), depth):
        sums.merge(totals)
    return sums


def _read_ahead(
    commits: Iterable[Commit | StoredCommit], names: frozenset[str], depth: int
) -> Iterator[dict[str, Tensor]]:
    """The sums of each commit in order, `depth` of them being read at the same time."""
    with ThreadPoolExecutor(depth) as readers:
        waiting: deque[Future[dict[str, Tensor]]] = deque()
        try:
            for commit in commits:
                waiting.append(readers.submit(commit.read, names))
                if len(waiting) == depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


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
        self._torn: dict[str, str] = {}
        """Commits whose header is whole and whose sums are not, with the reason: seen when they are added up."""

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
        reading = accept(stored, self.num_units)
        reading.rejected += torn
        return reading

    def pieces(self, reading: Reading, grid: Grid) -> Iterator[ExactSums]:
        """What the accepted commits add up to, see `pieces`. After a TornCommit `coverage` leaves that commit out, and may take another
        one in its place."""
        try:
            yield from pieces(reading.accepted, grid)
        except TornCommit as error:
            self._torn[error.name] = str(error)
            raise

    def _stored(self) -> tuple[list[StoredCommit], list[str]]:
        """Whole commits in the order of their names, and why others are not."""
        sizes = {
            name: size
            for name, size in artifacts.list_sizes(self.directory).items()
            if name.startswith("commit-") and name not in self._torn
        }

        def look(name: str) -> StoredCommit | TornCommit:
            try:
                return StoredCommit.open(artifacts.join(self.directory, name), name, sizes[name])
            except TornCommit as error:
                return error

        with ThreadPoolExecutor(READERS) as readers:
            found = list(readers.map(look, sizes))
        layouts: dict[tuple[Any, ...], Layout] = {}
        whole = []
        for commit in found:
            if isinstance(commit, StoredCommit):
                self._require_own(commit.fingerprint, commit.path)
                layout = layouts.setdefault((*commit.shapes.items(),), commit.layout)
                whole.append(replace(commit, layout=layout))
        return whole, [*self._torn.values(), *(str(error) for error in found if isinstance(error, TornCommit))]
