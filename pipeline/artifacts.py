"""Storage: files on any path that pyarrow knows, written whole or not at all, with a fingerprint of what they were made from.

A path is local (`/data/run`, `runs/a`, a mount of NFS) or a URI (`s3://bucket/run?region=eu-west-1`, `gs://bucket/run`). Local files are
written beside their target, synced and renamed; object stores have no rename and need none: an object is there when its upload is
finished, or not at all. What a user of either has to know: docs/storage.md.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode

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

OBJECT_STORES = ("s3", "gs", "gcs")
"""Where an object is seen whole or not at all. Of other file systems rows are read, but nothing is written to them."""

S3_PATIENCE = {"connect_timeout": 3.0, "request_timeout": 10.0, "max_attempts": 5}
"""Seconds until a server has to answer, and how often it is asked, with growing pauses (7 s in all on average). Options of a URI of
the same name replace them. pyarrow's own patience with a server that is silent is 100 s for each request."""

S3_NOT_COPIED = {"smart_defaults", "tls_ca_dir_path", "tls_verify_certificates"}
"""Options that pyarrow forgets when it copies a file system, which is the only way to give one from a URI our patience."""

GCS_PATIENCE_S = 30
"""pyarrow's own is 15 minutes. Option of a URI: `retry_limit_seconds`."""

STALE_ATTEMPTS = 5
"""How often a file is opened that was replaced while it was being read."""

WAYS_OUT = {
    "NO_SUCH_BUCKET": "Create the bucket, or correct its name.",
    "ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|HTTP status code: 40[13]|OAuth2": (
        "Check the credentials and their rights: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS, in the "
        "environment of every node."
    ),
    "NETWORK_CONNECTION|UNAVAILABLE|CURL": (
        "The server does not answer from here: check the address (endpoint_override, region, scheme) and the network."
    ),
}
"""What pyarrow says of object stores -> what to do."""


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


class BadAddress(StorageError):
    """A URI that no file system can have."""


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


def shown(text: str) -> str:
    """A message or a URI without the credentials in it."""
    return re.sub(r"://[^/@?\s]*@", "://", text)


def file_system(path: str) -> tuple[arrow_fs.FileSystem, str]:
    """The file system of a path and the path inside it. Errors are those of pyarrow; `storage` gives them a name.

    Of each bucket and its options one client is kept: to make one, its region and credentials are looked up, by requests.
    """
    if not is_uri(path):
        return arrow_fs.LocalFileSystem(), path
    base, _, options = path.partition("?")
    scheme, _, place = base.partition("://")
    if scheme not in OBJECT_STORES:
        return arrow_fs.FileSystem.from_uri(path)
    authority, _, inner = place.partition("/")
    bucket = authority.rpartition("@")[2]
    return _client(scheme, authority, options), f"{bucket}/{unquote(inner)}".rstrip("/")


@cache
def _client(scheme: str, authority: str, options: str) -> arrow_fs.FileSystem:
    given: dict[str, Any] = dict(parse_qsl(options, keep_blank_values=True))
    if scheme == "s3":
        try:
            patience = {name: type(usual)(given.pop(name, usual)) for name, usual in S3_PATIENCE.items()}
        except ValueError as error:
            raise ArrowInvalid(f"{error}, in one of {', '.join(S3_PATIENCE)}") from error
        given.setdefault("allow_delayed_open", "true")  # a small object is one request, not three
    else:
        given.setdefault("retry_limit_seconds", GCS_PATIENCE_S)
    filesystem, _ = arrow_fs.FileSystem.from_uri(f"{scheme}://{authority}/?{urlencode(given)}")
    if isinstance(filesystem, arrow_fs.S3FileSystem) and not given.keys() & S3_NOT_COPIED:
        attempts = int(patience.pop("max_attempts"))
        _, (same,) = filesystem.__reduce__()
        retries = arrow_fs.AwsStandardS3RetryStrategy(max_attempts=attempts)
        filesystem = arrow_fs.S3FileSystem(**{**same, **patience, "retry_strategy": retries})
    return filesystem


@contextmanager
def storage(path: str) -> Iterator[tuple[arrow_fs.FileSystem, str]]:
    """The file system of a path and the path in it; what goes wrong inside names the path and the way out."""
    try:
        yield file_system(path)
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise StorageError(
            errno.ENOENT, shown(f"cannot read {path}: there is no such file, or no such bucket")
        ) from error
    except (ArrowInvalid, NotImplementedError) as error:
        raise BadAddress(shown(f"{path}: {error}. Check the address.")) from error
    except OSError as error:
        if not is_uri(path):
            raise StorageError(error.errno, f"cannot read {path}: {error}") from error
        usual = "Check the address, its permissions and the network."
        way_out = next((todo for said, todo in WAYS_OUT.items() if re.search(said, str(error))), usual)
        raise RemoteError(shown(f"{path}: {error}. {way_out}")) from error


# --- whole files -------------------------------------------------------------------------------------------------------


def write_bytes(path: str, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part, even after a power cut."""
    write_parts(path, [data])


def write_parts(path: str, parts: Iterable[bytes | memoryview]) -> None:
    """The same for a file that comes in parts: none but the part in hand is in memory."""
    path = path.removeprefix("file://")
    if is_uri(path):
        _upload(path, parts)
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
            written = os.fstat(file.fileno())
        _rename(temporary, path, written)
        _sync_directory(directory)
    except BaseException as error:
        _discard(temporary)
        if not isinstance(error, OSError) or isinstance(error, StorageError):  # of the parts, not of this file
            raise
        raise StorageError(
            error.errno,
            f"cannot write {path}: {error.strerror}. What was there before is untouched. "
            "Free some space or choose a writable --run-dir, then run the same command again.",
        ) from error


def _upload(path: str, parts: Iterable[bytes | memoryview]) -> None:
    if path.partition("://")[0] not in OBJECT_STORES:
        raise StorageError(
            shown(
                f"cannot write {path}: a reader there could see half of a file. Choose a --run-dir on s3://, gs:// or a mounted path."
            )
        )
    with storage(path) as (filesystem, inner):
        stream = filesystem.open_output_stream(inner)
        try:
            for part in parts:
                stream.write(part)
            stream.close()
        except BaseException:
            # pyarrow closes a stream when the last reference to it goes, and what is closed can be read, however little of it was
            # written (github.com/apache/arrow/issues/40502). So this one goes never: it keeps a few MB until the process ends. Parts that
            # were sent are no object; the bucket's rule for incomplete uploads removes them.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(stream))
            raise


def _rename(temporary: str, path: str, written: os.stat_result) -> None:
    try:
        os.replace(temporary, path)
    except FileNotFoundError:
        # NFS asks again if the answer is lost, and hears that there is nothing to rename any more.
        if not os.path.exists(path) or os.stat(path).st_ino != written.st_ino:
            raise


def _sync_directory(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # mounts that know no fsync of a directory
            raise
    finally:
        os.close(descriptor)


def _discard(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return  # never created, or its disk is gone; the name cannot be mistaken for a finished file


def read_bytes(path: str) -> bytes:
    if is_uri(path):
        return _download(path)
    for attempt in range(STALE_ATTEMPTS):
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            if error.errno != errno.ESTALE or attempt == STALE_ATTEMPTS - 1:
                raise StorageError(error.errno, f"cannot read {path}: {error.strerror}") from error
    raise AssertionError


def _download(path: str) -> bytes:
    """pyarrow asks for the size and then for the bytes: of an object that is replaced between the two it would give a part."""
    with storage(path) as (filesystem, inner):
        for _ in range(STALE_ATTEMPTS):
            with filesystem.open_input_file(inner) as stream:
                try:
                    data = bytes(stream.read())
                except FileNotFoundError:  # of this generation, says GCS
                    continue
                with filesystem.open_input_file(inner) as again:
                    if again.metadata() == stream.metadata():
                        return data
    raise RemoteError(shown(f"{path}: it was replaced each time that it was read. Try again when its writer rests."))


def read_if_there(path: str) -> bytes | None:
    """By one request less than `exists` and `read_bytes`."""
    try:
        return read_bytes(path)
    except StorageError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


@contextmanager
def open_file(path: str) -> Iterator[Any]:
    """A file for reading in parts: `read` and `seek`."""
    if is_uri(path):
        with storage(path) as (filesystem, inner), filesystem.open_input_file(inner) as stream:
            yield stream
        return
    try:
        with open(path, "rb") as file:
            yield file
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(error.errno, f"cannot read {path}: {error.strerror}") from error


def copy(source: str, target: str) -> None:
    """A file of any size, in pieces."""

    def pieces() -> Iterator[bytes]:
        with open_file(source) as file:
            while piece := file.read(1 << 24):
                yield piece

    write_parts(target, pieces())


def exists(path: str) -> bool:
    if is_uri(path):
        with storage(path) as (filesystem, inner):
            return bool(filesystem.get_file_info(inner).type != arrow_fs.FileType.NotFound)
    return os.path.exists(path) or (_look_again(os.path.dirname(os.path.abspath(path))) and os.path.exists(path))


def _look_again(directory: str) -> bool:
    """A client of NFS remembers for up to a minute that a name was not there. To open its directory makes it ask the server."""
    try:
        os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY))
    except FileNotFoundError:
        above = os.path.dirname(directory)
        return above != directory and _look_again(above)
    except OSError:
        return False
    return True


def list_dir(path: str) -> list[str]:
    """Names in a directory, sorted; temporary files of unfinished writes are not listed. A missing directory is empty."""
    return list(list_sizes(path))


def list_sizes(path: str) -> dict[str, int]:
    """The same with the size of each file in bytes."""
    if is_uri(path):
        with storage(path) as (filesystem, inner):
            infos = filesystem.get_file_info(arrow_fs.FileSelector(inner, allow_not_found=True))
        sizes = {info.base_name: int(info.size or 0) for info in infos}
    elif exists(path):
        try:
            with os.scandir(path) as entries:
                sizes = {entry.name: size for entry in entries if (size := _size(entry)) is not None}
        except NotADirectoryError:
            sizes = {}
        except OSError as error:
            raise StorageError(error.errno, f"cannot list {path}: {error.strerror}") from error
    else:
        sizes = {}
    return {name: sizes[name] for name in sorted(sizes) if not name.startswith(".")}


def _size(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # a temporary file that was renamed meanwhile
        return None


def remove(path: str) -> None:
    """A missing file is as good as removed."""
    if is_uri(path):
        with storage(path) as (filesystem, inner), suppress(FileNotFoundError):
            filesystem.delete_file(inner)
        return
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(error.errno, f"cannot remove {path}: {error.strerror}") from error


def tensor_parts(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, tensor by tensor in the order of their names: the same tensors give the same bytes."""
    in_order = {name: tensors[name] for name in sorted(tensors)}
    yield from streamed_tensors(in_order, in_order.items(), metadata)


def streamed_tensors(
    about: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file whose tensors need not be in memory together.

    Args:
        about: what is to come, in its order; may be on the meta device.
        tensors: the same names, shapes and types, in the same order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in about.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for (name, expected), (given, tensor) in zip(about.items(), tensors, strict=True):
        assert (name, expected.shape, expected.dtype) == (given, tensor.shape, tensor.dtype), f"{given} for {name}"
        yield tensor_bytes(tensor)


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


def sha256_of_file(path: str) -> str:
    """Of its bytes, which are never all in memory."""
    state = hashlib.sha256()
    with open_file(path) as file:
        while piece := file.read(1 << 22):
            state.update(piece)
    return state.hexdigest()


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
        return read_if_there(self.path) or b""
