"""What the benchmarks have in common: rows to read, turns to take, cores, threads and memory."""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline.data.rows import Row, Source, open_source
from pipeline.data.units import Units

T = TypeVar("T")


# --- rows -------------------------------------------------------------------------------------------------------------


@contextmanager
def image_rows(data: str | None, num_rows: int, size: int = 224) -> Iterator[Source]:
    """`num_rows` rows in a temporary Parquet file: the first ones of `data`, or made-up JPEGs of size x size pixels."""
    if data is None:
        rows = ((photograph(i, size), i % 10) for i in range(num_rows))
    else:
        rows = ((row.image, row.label) for row in islice(rows_of(open_source(data)), num_rows))
    with tempfile.TemporaryDirectory() as folder:
        yield open_source(str(write_rows(Path(folder) / "rows.parquet", rows)))


def rows_of(source: Source) -> Iterator[Row]:
    """All rows in their order, encoded as they are stored; holds one row group."""
    for unit in Units(source.row_groups, 1 << 20):
        yield from source.read(unit.file, unit.row_group, unit.start, unit.stop)


def write_rows(path: Path, rows: Iterable[tuple[bytes | None, int | None]], rows_per_group: int = 256) -> Path:
    """Images and labels in Hugging Face's layout, written row group by row group."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())])
    rows = iter(rows)
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, rows_per_group)):
            content = [{"image": {"bytes": data, "path": None}, "label": label} for data, label in group]
            writer.write_table(pa.Table.from_pylist(content, schema))
    return path


def photograph(seed: int, size: int) -> bytes:
    """A JPEG with the shapes, the grain and so about the bytes of a photograph."""
    random = np.random.default_rng(seed)
    shapes = Image.fromarray(random.integers(256, size=(12, 12, 3), dtype=np.uint8)).resize((size, size), Image.BICUBIC)
    grain = random.normal(0, 6, (size, size, 1))
    return jpeg(Image.fromarray((np.asarray(shapes) + grain).clip(0, 255).astype(np.uint8)), quality=80)


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


# --- measuring --------------------------------------------------------------------------------------------------------


def in_turns(works: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median seconds of each work, measured one after the other, again and again, after one turn to warm up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes in the calling thread alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """The calling thread, and those that it starts, on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages}


def in_fresh_process(work: Callable[..., T], *args: Any) -> T:
    """The result of `work`, a function of a module, in a process that has done nothing before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(work, *args).result()


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Resident memory of this process in MB: filled with "before_mb" at once, with "peak_mb" and "extra_mb" at the end."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of now is what there is now
    found = {"before_mb": _status_mb("VmRSS")}
    yield found
    found["peak_mb"] = _status_mb("VmHWM")
    found["extra_mb"] = found["peak_mb"] - found["before_mb"]


@contextmanager
def peak_of_its_own(every_s: float = 0.002) -> Iterator[dict[str, float]]:
    """The same of what this process alone holds: without pages of mapped files, which the kernel may take back. Looked at every 2 ms."""
    found = {"before_mb": _status_mb("RssAnon"), "peak_mb": 0.0}
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(every_s):
            found["peak_mb"] = max(found["peak_mb"], _status_mb("RssAnon"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
    found["extra_mb"] = found["peak_mb"] - found["before_mb"]


def _status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))
