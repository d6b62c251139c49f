"""A commit of many weight statistics beside the raw write speed of the same disk: `python -m benchmarks.commits`.

raw     the same bytes, already in one buffer, written and synced by plain file calls
commit  header, checksums in a second thread, atomic file, sync
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.measuring import one_thread, versions
from pipeline.execution.ledger import Commit, Ledger
from pipeline.saliency.exact import ExactSums, Grid
from pipeline.saliency.statistics import WEIGHT_KINDS


def measure(weights_millions: float = 60.0, turns: int = 7, directory: str | None = None) -> dict[str, Any]:
    """Seconds and megabytes per second of both, measured in turns, and what reading the commit back into sums takes.

    Args:
        weights_millions: of the network; each has three sums of eight bytes.
        turns: of which the median counts.
        directory: on the disk in question; None: the system's temporary one.
    """
    tensors = 60
    shape = (int(weights_millions * 1e6 / tensors / 1000), 1000)
    totals = {
        f"{kind}/w{i:02d}": torch.randint(-(2**40), 2**40, shape) for kind in WEIGHT_KINDS for i in range(tensors)
    }
    size = sum(total.numel() * 8 for total in totals.values())
    times: dict[str, list[float]] = {"raw": [], "commit": [], "read": []}
    with one_thread(), tempfile.TemporaryDirectory(dir=directory) as folder:
        ledger = Ledger(f"{folder}/units", 1, "benchmark")
        for _ in range(turns):
            os.sync()
            times["raw"].append(_raw(Path(folder, "raw"), totals))
            os.sync()
            started = time.perf_counter()
            name = ledger.write(Commit((0,), 1, totals))
            times["commit"].append(time.perf_counter() - started)
            started = time.perf_counter()
            grid = Grid({key: [0] for key in totals}, 50)
            for piece in ledger.pieces(ledger.coverage(), grid):
                assert isinstance(piece, ExactSums)
            times["read"].append(time.perf_counter() - started)
            os.unlink(Path(ledger.directory, name))
    seconds = {name: statistics.median(found) for name, found in times.items()}
    return {
        "megabytes": size / 1e6,
        **{f"{name}_mb_per_s": size / 1e6 / value for name, value in seconds.items()},
        # Turn by turn: what the system still writes back of the one slows the next.
        "ratio": statistics.median(raw / commit for raw, commit in zip(times["raw"], times["commit"], strict=True)),
        "versions": versions("torch"),
    }


def _raw(path: Path, totals: dict[str, torch.Tensor]) -> float:
    buffers = [total.numpy().data for total in totals.values()]
    started = time.perf_counter()
    with open(path, "wb") as file:
        for buffer in buffers:
            file.write(buffer)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


if __name__ == "__main__":
    print(json.dumps(tyro.cli(measure), indent=1))
