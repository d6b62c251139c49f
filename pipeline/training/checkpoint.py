"""Checkpoints of a training run: `step-00000123.pt`, whole or not there, plain values only, refused when foreign.

One file holds everything that the next step depends on, so that a resumed run equals the undisturbed one. Two are
kept: should the newest be damaged, the one before it is used. Damage is found by the CRC-32 that torch writes with
each tensor.

Where several ranks hold one network, each writes its rows into `step-00000123/` (torch.distributed.checkpoint, DCP). Those files
come first and the .pt last: it has the CRC-32 of each of them, and an empty place (a tensor on the meta device) for each of their
tensors. So there is one rule for both: a step whose .pt can be read, with all that it names, is a checkpoint. Whoever loads one says
what it wants for each place: the whole tensor or its own rows, also if another number of ranks has written them.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import re
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.tensor import DTensor

from pipeline import artifacts
from pipeline.artifacts import StaleArtifact, StorageError
from pipeline.models.sharding import together

logger = logging.getLogger(__name__)

NAME = re.compile(r"step-(\d{8})\.pt")
FOLDER = re.compile(r"step-(\d{8})")
NUM_KEPT = 2
SHARDS = "shards"
"""In a .pt whose tensors lie in files beside it: name of each file -> [bytes, CRC-32]."""
PIECE = 1 << 22

Place = Callable[[Tensor], Tensor]
"""Of a tensor on the meta device: a tensor to load it into, whole or in rows."""


class DamagedCheckpoint(ValueError):
    """The bytes are not those that were written."""


def path_of(directory: str, step: int) -> str:
    return artifacts.join(directory, f"step-{step:08d}.pt")


def steps_in(directory: str) -> list[int]:
    """Steps with a checkpoint, newest first."""
    return sorted((int(m[1]) for m in map(NAME.fullmatch, artifacts.list_dir(directory)) if m), reverse=True)


def save(directory: str, state: Mapping[str, Any]) -> str:
    """Write `state` (with "step" and "identity") atomically, then remove all but the newest two. Returns the path.

    Files of later steps are removed, too: had they been readable, this run would have started from them.
    """
    step = int(state["step"])
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    path = path_of(directory, step)
    artifacts.write_bytes(path, buffer.getvalue())
    kept = [s for s in steps_in(directory) if s <= step][:NUM_KEPT]
    for other in steps_in(directory):
        if other not in kept:
            artifacts.remove(path_of(directory, other))
    for name in artifacts.list_dir(directory):
        folder = FOLDER.fullmatch(name)
        if folder and int(folder[1]) not in kept:  # of the removed ones, or of a save that was cut off
            _remove_folder(artifacts.join(directory, name))
    return path


def load(path: str, place: Place | None = None) -> dict[str, Any]:
    """Read one checkpoint. Raises DamagedCheckpoint; a file that cannot be reached raises OSError.

    Args:
        place: for the tensors of a sharded one; None loads them whole. Everything else is loaded to the CPU.
    """
    return _filled(path, _load_file(path), place)


def _load_file(path: str) -> dict[str, Any]:
    data = artifacts.read_bytes(path)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch.load checks the structure, not the contents
            damaged = archive.testzip()
        if damaged is not None:
            raise DamagedCheckpoint(f"{path}: the CRC of {damaged} does not fit its bytes")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise DamagedCheckpoint(f"{path}: {error}") from error


def newest(
    directory: str, identity: Mapping[str, Any], place: Place | None = None
) -> tuple[str, dict[str, Any]] | None:
    """The newest undamaged checkpoint and its path; None if there is none. Raises StaleArtifact if it is of something
    else.

    Args:
        directory: local path or URI.
        identity: plain values, with the run's "fingerprint": what the checkpoint must have been made from.
        place: see `load`.
    """
    for step in steps_in(directory):
        path = path_of(directory, step)
        try:
            state = _load_file(path)
            _require_shards(path, state)
            stored = state["identity"]
        except DamagedCheckpoint as error:
            logger.warning("damaged checkpoint passed over, an earlier one is used: %s", error)
            continue
        if stored != identity:
            changes = "; ".join(artifacts.differences(stored, identity))
            raise StaleArtifact(
                f"{path} was trained from {stored.get('fingerprint')}, this run asks for {identity.get('fingerprint')} "
                f"({changes}). Use another directory, or remove {directory} to train anew."
            )
        return path, _filled(path, state, place)
    return None


# --- tensors that several ranks hold together -------------------------------------------------------------------------


def save_sharded(directory: str, state: Mapping[str, Any], rank: int, world_size: int) -> None:
    """`save` on all ranks at the same time: each writes its rows of every DTensor in `state`, rank 0 all that is left.

    An error of one rank is raised on all. Until the last moment the checkpoints from before are untouched.
    """
    folder = _folder_of(path_of(directory, int(state["step"])))
    shards: dict[str, DTensor] = {}
    rest = _walk(state, lambda key, value: _emptied(key, value, shards))
    together(lambda: _clear(directory, int(state["step"])) if rank == 0 else None, world_size)
    writer = _Writer(folder)
    _unwrapped(lambda: dcp.save(shards, storage_writer=writer))
    files: list[Any] = [None] * world_size
    dist.all_gather_object(files, writer.fs.written)
    named = {name: values for of_rank in files for name, values in of_rank.items()}
    together(lambda: save(directory, {**rest, SHARDS: named}) if rank == 0 else None, world_size)


def _emptied(key: str, value: Tensor, shards: dict[str, DTensor]) -> Tensor:
    if not isinstance(value, DTensor):
        return value
    shards[key] = value
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _filled(path: str, state: dict[str, Any], place: Place | None) -> dict[str, Any]:
    """`state` with the tensors of its shards."""
    if SHARDS not in state:
        return state
    empty: dict[str, Tensor] = {}
    _walk(state, lambda key, value: empty.setdefault(key, value) if value.is_meta else value)
    place = place or (lambda value: torch.empty_like(value, device="cpu"))
    tensors = {key: place(value) for key, value in empty.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads for itself, as is meant
        _unwrapped(lambda: dcp.load(tensors, storage_reader=_Reader(_folder_of(path)), no_dist=True))
    return {name: v for name, v in _walk(state, lambda key, value: tensors.get(key, value)).items() if name != SHARDS}


def _walk(value: Any, change: Callable[[str, Tensor], Any], key: str = "") -> Any:
    """`value` with each tensor changed; its key tells the way to it."""
    if isinstance(value, Mapping):
        return {name: _walk(inner, change, f"{key}/{name}") for name, inner in value.items()}
    return change(key, value) if isinstance(value, Tensor) else value


def _unwrapped(work: Callable[[], Any]) -> None:
    """DCP collects the errors of all ranks into one of its own; the first of them says what to do."""
    try:
        work()
    except dcp.CheckpointException as failure:
        raise next(error for error, _ in failure.failures.values()) from failure


def _require_shards(path: str, state: Mapping[str, Any]) -> None:
    """DamagedCheckpoint if a file that the .pt names is not there or has other bytes."""
    folder, files = _folder_of(path), state.get(SHARDS, {})
    sizes = artifacts.list_sizes(folder) if files else {}
    for name, (size, _) in files.items():
        if sizes.get(name) != size:
            raise DamagedCheckpoint(f"{artifacts.join(folder, name)} has {sizes.get(name, 'no')} bytes of {size}")
    with ThreadPoolExecutor(8) as threads:  # the other ranks wait
        found = dict(zip(files, threads.map(lambda name: _crc(artifacts.join(folder, name)), files), strict=True))
    for name, (_, crc) in files.items():
        if found[name] != crc:
            raise DamagedCheckpoint(f"{artifacts.join(folder, name)}: its CRC does not fit its bytes")


def _crc(path: str) -> int:
    crc = 0
    with artifacts.open_file(path) as file:
        while piece := file.read(PIECE):
            crc = zlib.crc32(piece, crc)
    return crc


def _folder_of(path: str) -> str:
    base, mark, options = path.partition("?") if artifacts.is_uri(path) else (path, "", "")
    return base.removesuffix(".pt") + mark + options


def _clear(directory: str, step: int) -> None:
    """Remove a checkpoint of this step: it was damaged, or cut off."""
    path = path_of(directory, step)
    if artifacts.exists(path):
        artifacts.remove(path)
    _remove_folder(_folder_of(path))


def _remove_folder(folder: str) -> None:
    if not artifacts.is_uri(folder):
        shutil.rmtree(folder, ignore_errors=True)  # with what a dead writer has left there
    elif artifacts.exists(folder):
        with artifacts.storage(folder) as (filesystem, inner):
            filesystem.delete_dir(inner)


class _Store(FileSystemBase):
    """What DCP asks of a file system, on any path that `artifacts` knows."""

    def __init__(self) -> None:
        self.written: dict[str, tuple[int, int]] = {}
        """Name of each finished file -> bytes, CRC-32."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        if mode == "rb":
            with artifacts.open_file(path) as stream:
                yield stream
            return
        stream = _Checked(path)
        yield stream
        stream.close()
        self.written[_name(path)] = (stream.size, stream.crc)

    def concat_path(self, path: Any, suffix: str) -> str:
        return artifacts.join(str(path), suffix.removeprefix("."))  # hidden names are not listed

    def rename(self, path: Any, new_path: Any) -> None:
        """Of DCP's metadata alone, which is small; object stores cannot rename."""
        artifacts.copy(path, new_path)
        artifacts.remove(path)
        self.written[_name(new_path)] = self.written.pop(_name(path))

    def init_path(self, path: Any) -> str:
        return str(path)

    def mkdir(self, path: Any) -> None:
        if not artifacts.is_uri(path):
            os.makedirs(path, exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def exists(self, path: Any) -> bool:
        return artifacts.exists(path)

    def rm_file(self, path: Any) -> None:
        artifacts.remove(path)


def _name(path: str) -> str:
    return (path.partition("?")[0] if artifacts.is_uri(path) else path).rpartition("/")[2]


class _Checked:
    """A file that is written from its beginning to its end, synced when it is closed, and counted on the way.

    Should it be cut off, a part may be seen of it: no .pt names that.
    """

    def __init__(self, path: str) -> None:
        self.path, self.size, self.crc, self.closed = path, 0, 0, False
        with self._explained() as (filesystem, inner):
            self.stream: Any = filesystem.open_output_stream(inner) if filesystem else open(path, "wb")  # noqa: SIM115

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        with self._explained():
            self.stream.write(view)
        self.size += len(view)
        self.crc = zlib.crc32(view, self.crc)
        return len(view)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """When it is closed."""

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        with self._explained() as (filesystem, _):
            if filesystem is None:
                self.stream.flush()
                os.fsync(self.stream.fileno())
            self.stream.close()

    @contextmanager
    def _explained(self) -> Iterator[tuple[Any, str]]:
        """The file system of a URI; errors name the path and the way out."""
        if artifacts.is_uri(self.path):
            with artifacts.storage(self.path) as found:
                yield found
            return
        try:
            yield None, self.path
        except OSError as error:
            raise StorageError(
                error.errno,
                f"cannot write {self.path}: {error.strerror}. The checkpoints before this one are untouched. Free some space, then run the "
                "same command again.",
            ) from error


class _Writer(dcp.FileSystemWriter):
    def __init__(self, folder: str) -> None:
        super().__init__(folder, sync_files=False)  # `_Checked` syncs
        self.fs: _Store = _Store()  # type: ignore[assignment]
        self.path = folder  # type: ignore[assignment]


class _Reader(dcp.FileSystemReader):
    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.fs = _Store()  # type: ignore[assignment]
        self.path = folder  # type: ignore[assignment]
