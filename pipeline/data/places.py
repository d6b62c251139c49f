"""Files behind a path: one file, a directory, a glob, local or on any file system that pyarrow knows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from pyarrow import fs as arrow_fs

from pipeline.artifacts import BadAddress, absolute, is_uri, shown, storage
from pipeline.data.source import DataError

WILDCARDS = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Files:
    """Files under one root, sorted by name. Plain data: the file system is made again where it is needed."""

    root: str
    """Directory as the user wrote it: an absolute local path or a URI."""
    names: tuple[str, ...]
    """Relative to `root`."""
    sizes: tuple[int, ...]
    """Bytes."""

    def path(self, index: int) -> str:
        """For a reader of messages."""
        return shown(f"{self.root.partition('?')[0].rstrip('/')}/{self.names[index]}")

    def select(self, suffixes: tuple[str, ...]) -> Files:
        kept = [i for i, name in enumerate(self.names) if name.lower().endswith(suffixes)]
        return Files(self.root, tuple(self.names[i] for i in kept), tuple(self.sizes[i] for i in kept))


def find(path: str) -> Files:
    """All files behind `path`; names that begin with a dot or an underscore, or lie in such a directory, do not
    count."""
    path = absolute(path)
    base, query = (path.partition("?")[::2]) if is_uri(path) else (path, "")
    try:
        with storage(path) as (filesystem, inner):
            info = filesystem.get_file_info(inner)
    except BadAddress as error:
        known = "s3://, gs://, abfs://, hdfs://, file://"
        raise DataError(f"{error} Known: {known}, a local path, or hf:OWNER/NAME for the Hugging Face Hub.") from error
    if info.type == arrow_fs.FileType.NotFound and WILDCARDS.search(base):  # a real `photos[1]` is no pattern
        return _glob(base, query)
    if info.type == arrow_fs.FileType.NotFound:
        raise DataError(
            shown(f"{path}: no such file or directory. Correct the path; relative ones start at the working directory.")
        )
    if info.type == arrow_fs.FileType.File:
        directory = base.rpartition("/")[0]
        return Files(_with_query(directory or "/", query), (inner.rpartition("/")[2],), (info.size,))
    return _walk(path)


def _walk(root: str) -> Files:
    with storage(root) as (filesystem, inner):
        inner = inner.rstrip("/")
        infos = filesystem.get_file_info(arrow_fs.FileSelector(inner, recursive=True, allow_not_found=True))
    found = sorted((info.path[len(inner) + 1 :], info.size) for info in infos if info.type == arrow_fs.FileType.File)
    found = [(name, size) for name, size in found if not any(part[0] in "._" for part in name.split("/"))]
    return Files(root, tuple(name for name, _ in found), tuple(size for _, size in found))


def _glob(base: str, query: str) -> Files:
    parts = base.split("/")
    first = next(i for i, part in enumerate(parts) if WILDCARDS.search(part))
    files = _walk(_with_query("/".join(parts[:first]) or "/", query))
    below = "/".join(parts[first:])
    pattern = re.compile(_translate(unquote(below) if is_uri(base) else below))
    kept = [i for i, name in enumerate(files.names) if pattern.fullmatch(name)]
    if not kept:
        raise DataError(
            f"{shown(base)}: no file matches. In a glob, * stays within one directory and ** goes through all below."
        )
    return Files(files.root, tuple(files.names[i] for i in kept), tuple(files.sizes[i] for i in kept))


def _translate(pattern: str) -> str:
    """A glob as a regular expression: `**/` any directories, `*` and `?` no slash, `[abc]` and `[!abc]` one of a
    set."""
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]*\]|.", pattern)
    return "".join(
        pieces.get(token) or (token.replace("[!", "[^") if len(token) > 1 else re.escape(token)) for token in tokens
    )


def _with_query(base: str, query: str) -> str:
    return f"{base}?{query}" if query else base
