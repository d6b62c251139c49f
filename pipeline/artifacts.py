"""Storage: files on any path that pyarrow knows, written whole or not at all, with a fingerprint of what they were made from.

A path is local (`/data/run`, `runs/a`) or a URI (`s3://bucket/run?region=eu-west-1`, `gs://bucket/run`). Local files are written beside their
target, synced and renamed; object stores have no rename and need none: a PUT is seen whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from pyarrow import ArrowInvalid
from pyarrow import fs as arrow_fs
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As safetensors names them."""


class StaleArtifact(ValueError):
    """An artifact was made from other inputs than this run has."""


class StorageError(OSError):
    """A path cannot be read or written; the message says which and what to do."""

    @property
    def may_pass(self) -> bool:
        """Whether the same may work in a moment: an object store or a network file system that does not answer."""
        return isinstance(self, RemoteError) or self.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)


class RemoteError(StorageError):
    """An object store refuses or does not answer."""


# --- paths -------------------------------------------------------------------------------------------------------------


def is_uri(path: str) -> bool:
    return "://" in path


def join(root: str, *parts: str) -> str:
    """The options of a URI (`?region=...`) stay at its end."""
    base, mark, options = root.partition("?") if is_uri(root) else (root, "", "")
    return "/".join([base.rstrip("/"), *parts]) + mark + options


def absolute(path: str) -> str:
    """`path` independent of the working directory: Ray's workers run in another one."""
    path = path.removeprefix("file://")
    return path.rstrip("/") if is_uri(path) else os.path.abspath(os.path.expanduser(path))


@contextmanager
def _remote(path: str) -> Iterator[tuple[arrow_fs.FileSystem, str]]:
    """The file system of a URI and the path in it; what goes wrong inside names the URI."""
    try:
        yield arrow_fs.FileSystem.from_uri(path)
    except (OSError, ArrowInvalid, NotImplementedError) as error:
        raise RemoteError(f"{path}: {error}. Check the address, its permissions and the network.") from error


# --- whole files -------------------------------------------------------------------------------------------------------


def write_bytes(path: str, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part, even after a power cut."""
    write_parts(path, [data])


def write_parts(path: str, parts: Iterable[bytes | memoryview]) -> None:
    """The same for a file that comes in parts: none but the part in hand is in memory."""
    if is_uri(path):
        # A stream of an object store that is not closed leaves nothing; leaving the block by an error must not close it.
        with _remote(path) as (filesystem, inner):
            stream = filesystem.open_output_stream(inner)
            for part in parts:
                stream.write(part)
            stream.close()
        return
    directory = os.path.dirname(os.path.abspath(path))
    temporary = os.path.join(directory, f".{os.path.basename(path)}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        os.makedirs(directory, exist_ok=True)
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(directory)
    except OSError as error:
        _discard(temporary)
        raise StorageError(
            error.errno,
            f"cannot write {path}: {error.strerror}. What was there before is untouched. "
            "Free some space or choose a writable --run-dir, then run the same command again.",
        ) from error


def _sync_directory(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return  # never created, or its disk is gone; the name cannot be mistaken for a finished file


def read_bytes(path: str) -> bytes:
    if is_uri(path):
        with _remote(path) as (filesystem, inner), filesystem.open_input_file(inner) as stream:
            return bytes(stream.read())
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise StorageError(error.errno, f"cannot read {path}: {error.strerror}") from error


@contextmanager
def open_file(path: str) -> Iterator[Any]:
    """A file for reading in parts: `read` and `seek`."""
    if is_uri(path):
        with _remote(path) as (filesystem, inner), filesystem.open_input_file(inner) as stream:
            yield stream
        return
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise StorageError(error.errno, f"cannot read {path}: {error.strerror}") from error


def copy(source: str, target: str) -> None:
    """A file of any size, in pieces."""
    with open_file(source) as file:
        write_parts(target, iter(lambda: file.read(1 << 24), b""))


def exists(path: str) -> bool:
    if is_uri(path):
        with _remote(path) as (filesystem, inner):
            return bool(filesystem.get_file_info(inner).type != arrow_fs.FileType.NotFound)
    return os.path.exists(path)


def list_dir(path: str) -> list[str]:
    """Names in a directory, sorted; temporary files of unfinished writes are not listed. A missing directory is empty."""
    return list(list_sizes(path))


def list_sizes(path: str) -> dict[str, int]:
    """The same with the size of each file in bytes."""
    if is_uri(path):
        with _remote(path) as (filesystem, inner):
            infos = filesystem.get_file_info(arrow_fs.FileSelector(inner, allow_not_found=True))
        sizes = {info.base_name: int(info.size or 0) for info in infos}
    elif os.path.isdir(path):
        with os.scandir(path) as entries:
            sizes = {entry.name: size for entry in entries if (size := _size(entry)) is not None}
    else:
        sizes = {}
    return {name: sizes[name] for name in sorted(sizes) if not name.startswith(".")}


def _size(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # a temporary file that was renamed meanwhile
        return None


def remove(path: str) -> None:
    if is_uri(path):
        with _remote(path) as (filesystem, inner):
            filesystem.delete_file(inner)
    elif os.path.exists(path):
        os.unlink(path)


def tensor_parts(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, tensor by tensor in the order of their names: the same tensors give the same bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in sorted(tensors):
        yield tensor_bytes(tensors[name])


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Its values in C order, without a copy where they lie so on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_tensors(path: str, tensors: Mapping[str, Tensor]) -> None:
    write_parts(path, tensor_parts(tensors))


def read_tensors(path: str) -> dict[str, Tensor]:
    """Of a local file the tensors are read when they are looked at."""
    if not exists(path):
        raise StorageError(f"cannot read {path}: there is no such file")
    try:
        return load_safetensors(read_bytes(path)) if is_uri(path) else load_file(path)
    except SafetensorError as error:
        raise StorageError(f"{path} is no whole safetensors file ({error}). Remove it to make it anew.") from error


def write_json(path: str, value: Any) -> None:
    write_bytes(path, _json_bytes(value))


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(path: str) -> Any:
    return _parse_json(path, read_bytes(path))


def _parse_json(path: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise StorageError(f"{path} is not valid JSON ({error}). Remove it to make it anew.") from error


def probe_writable(directory: str) -> None:
    """Write and remove a small file: a read-only or full place is found before the work, not after it."""
    probe = join(directory, f"probe-{socket.gethostname()}-{os.getpid()}")
    write_bytes(probe, b"x" * 4096)
    remove(probe)


# --- fingerprints ------------------------------------------------------------------------------------------------------


def sha256_of(value: Any) -> str:
    """sha256 of the canonical JSON of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()


def short(fingerprint: str) -> str:
    return fingerprint[:12]


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Which leaves differ, as `name: stored -> wanted`."""
    lines: list[str] = []
    for key in sorted({*stored, *wanted}):
        old, new = stored.get(key), wanted.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old!r} -> {new!r}")
    return lines


# --- the manifest ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageRecord:
    """One finished stage: what it was made from, and what it made."""

    state: str
    fingerprint: str
    inputs: dict[str, Any]
    artifact: str
    started: float
    """When its last attempt began: a stage that went on the next morning did not take the night."""
    finished: float
    attempts: int = 1

    @property
    def seconds(self) -> float:
        """Of the last attempt."""
        return self.finished - self.started


class Manifest:
    """`RUN/manifest.json`: stage -> record. Written last, after the stage's artifact: a stage without a record is not done."""

    def __init__(self, run_dir: str) -> None:
        self.path = join(run_dir, "manifest.json")
        self._seen = self._bytes()
        stored = _parse_json(self.path, self._seen) if self._seen else {}
        self.stages = {
            name: StageRecord(**{k: v for k, v in record.items() if k != "seconds"}) for name, record in stored.items()
        }

    def finished(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        """Is `stage` done from these very inputs? Raises StaleArtifact if it was made from others."""
        record = self.stages.get(stage)
        if record is None or record.state != "done":
            return False
        wanted = sha256_of(inputs)
        if record.fingerprint != wanted:
            changed = "; ".join(self.changes(stage, inputs)) or "inputs of an earlier version"
            raise StaleArtifact(
                f"{record.artifact or self.path}: stage '{stage}' was made from {short(record.fingerprint)}, this run asks for "
                f"{short(wanted)} ({changed}). Use another --run-dir, or the first run's values."
            )
        return True

    def changes(self, stage: str, inputs: Mapping[str, Any]) -> list[str]:
        """What differs from the inputs that the stage was done or begun with."""
        record = self.stages.get(stage)
        return differences(record.inputs, inputs) if record else []

    def begin(self, stage: str, inputs: Mapping[str, Any]) -> None:
        """Note the inputs before the work. A stage that was begun with others begins anew with these."""
        attempts = self.stages[stage].attempts + 1 if stage in self.stages else 1
        self._put(stage, StageRecord("running", sha256_of(inputs), dict(inputs), "", time.time(), 0.0, attempts))

    def finish(self, stage: str, artifact: str) -> None:
        record = self.stages[stage]
        self._put(stage, replace(record, state="done", artifact=artifact, finished=time.time()))

    def adopt(self, stage: str, record: StageRecord) -> None:
        """Take over a stage that was done in another run, its artifact having been copied."""
        self._put(stage, record)

    def _put(self, stage: str, record: StageRecord) -> None:
        if self._bytes() != self._seen:
            raise StorageError(
                f"{self.path} was changed by somebody else: another driver works in this directory. This one stops; look for the "
                "other with `ray job list`, or let it finish."
            )
        self.stages[stage] = record
        content = {
            name: {**asdict(record), "seconds": round(record.seconds, 3)} for name, record in self.stages.items()
        }
        self._seen = _json_bytes(content)
        write_bytes(self.path, self._seen)

    def _bytes(self) -> bytes:
        return read_bytes(self.path) if exists(self.path) else b""
