"""The scoring pass from Parquet through Ray beside a bare PyTorch loop: `python -m benchmarks.stage --data ROWS.parquet`.

bare         one process, one thread: read, decode, GateStatistics, sums in float64
one_worker   run_pass and RayPool with one worker of one thread: the same rows, exact sums, commits
two_workers  the same with two

Every computing process, with all that it starts, is held on one core of its own: otherwise a worker's decoding thread would have the
second core for itself, which the bare loop does not. Ray's own processes are held on the first core, the one worker on the last; two
workers on two cores share the first with Ray, which takes a few per cent of it.

Rates count from the first unit to the merged result. What comes before is told by itself: `start_up_s` until a new worker has computed
the pilot, `begin_pass_s` the same for a worker that is up already. `cpu_ratio_to_bare` compares processor time, of all threads of the
process and with the pilot on both sides: what the machinery costs, hardly touched by whatever else a machine does.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import torch
import tyro
from torch import Tensor, nn

from benchmarks.measuring import image_rows, on_core, one_thread, versions
from pipeline.data.batches import Decoder, unit_batches
from pipeline.data.rows import Source
from pipeline.data.units import Units
from pipeline.execution.drive import run_pass
from pipeline.execution.ledger import Ledger
from pipeline.execution.pool import RayPool, connect
from pipeline.execution.worker import MEMORY_FORMAT, Pass
from pipeline.models import zoo
from pipeline.models.graph import Graph
from pipeline.models.task import Place
from pipeline.models.trace import propagate
from pipeline.saliency.statistics import GateStatistics


def measure(
    data: str | None = None,
    model: str = "resnet50",
    size: int = 64,
    rows: int = 1280,
    micro_batch: int = 16,
    turns: int = 2,
) -> dict[str, Any]:
    """Rows per second of each way, the median of turns, and the two ratios. Linux; needs two cores for the second.

    Args:
        data: Parquet file in Hugging Face's layout; None: made-up JPEGs.
        model: name in timm.
        size: height and width of the decoded images in pixels.
        rows: scored by each way in each turn.
        micro_batch: rows in one micro-batch, and in one unit.
        turns: after the start-up, which warms up.
    """
    cores = sorted(os.sched_getaffinity(0))
    with one_thread(), image_rows(data, rows) as source:
        scoring = Scoring(source, model, size, micro_batch)
        with on_core(cores[0]):  # Ray's own processes inherit it; workers move to theirs
            connect(None, num_cpus=3)  # one_worker and two_workers, which wait while it is not their turn
        try:
            found = _compare(scoring, {"one_worker": cores[-1:], "two_workers": cores[-2:]}, turns)
        finally:
            ray.shutdown()
    return {"rows": rows, "units": len(scoring.units), **found, "versions": versions("torch", "ray", "timm")}


class Scoring:
    """One scoring pass, to be done in different ways."""

    def __init__(self, source: Source, model: str, size: int, micro_batch: int) -> None:
        self.source, self.decoder, self.micro_batch = source, Decoder(size), micro_batch
        torch.manual_seed(0)
        self.network = zoo.build(model)
        self.graph = propagate(self.network, torch.zeros(1, 3, size, size))
        self.units = Units(source.row_groups, micro_batch)
        self.options = {"micro_batch": micro_batch, "num_classes": 1000, "on_bad_row": "stop"}

    def bare(self, core: int) -> dict[str, float]:
        """The loop that one would write without the pipeline. A first unit warms up, as the pilot does in a pass."""
        task = GateStatistics(self.network, self.graph)
        with on_core(core):
            cpu_s = time.process_time()
            task.to(torch.device("cpu"), MEMORY_FORMAT)
            self._loop(task, num_units=1)
            started = time.perf_counter()
            self._loop(task, len(self.units))
            rows_per_s = self.units.num_rows / (time.perf_counter() - started)
            return {"rows_per_s": rows_per_s, "cpu_s": time.process_time() - cpu_s}

    def _loop(self, task: GateStatistics, num_units: int) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for index in range(num_units):
            for batch in unit_batches(self.source, self.units[index], self.decoder, **self.options, threads=0):
                images = batch.images_NCHW.to(memory_format=MEMORY_FORMAT)
                for name, value in task(images, batch.labels_N).items():
                    sums[name] = sums[name] + value if name in sums else value
        return sums

    def through(self, pool: RayPool, cores: Sequence[int], num_rows: int | None = None) -> dict[str, Any]:
        """A pass by workers that hold `cores`; over all rows, or over so many."""
        units = Units(self.source.row_groups, self.micro_batch, num_rows)
        with tempfile.TemporaryDirectory() as folder:
            work = Pass(
                task=OnOwnCore(self.network, self.graph, cores, folder),
                source=self.source,
                units=units,
                decoder=self.decoder,
                ledger=Ledger(f"{folder}/units", len(units), "benchmark"),
                grid=None,
                **self.options,
            )
            started = time.time()
            cpu_s = pool.call(time.process_time)  # of its first worker
            result = run_pass(work, pool)
            ended = time.time()
            begun = os.stat(f"{folder}/units/grid.json").st_mtime  # written when the pilot is known
        return {
            "rows_per_s": result.rows / (ended - begun),
            "begin_s": begun - started,
            "cpu_s": pool.call(time.process_time) - cpu_s,
            "commits": result.commits,
            "sha256": result.sha256,
        }


class OnOwnCore(GateStatistics):
    """Moves its worker to the first of `cores` that no other worker has claimed, by a file in `claims`."""

    def __init__(self, model: nn.Module, graph: Graph, cores: Sequence[int], claims: str) -> None:
        super().__init__(model, graph)
        self.cores, self.claims = cores, claims

    def place(self, place: Place) -> None:
        for core in self.cores:
            with suppress(FileExistsError):
                Path(self.claims, f"core-{core}").touch(exist_ok=False)
                os.sched_setaffinity(0, {core})  # of this thread; those that it starts inherit it
                break
        super().place(place)


def _compare(scoring: Scoring, cores: dict[str, Sequence[int]], turns: int) -> dict[str, Any]:
    pools = {name: RayPool(len(held), "cpu", threads=1) for name, held in cores.items()}
    begin = {
        name: scoring.through(pools[name], held, 8 * scoring.micro_batch)["begin_s"] for name, held in cores.items()
    }
    runs: dict[str, list[dict[str, Any]]] = {"bare": [], **{name: [] for name in cores}}
    for _ in range(turns):
        runs["bare"].append(scoring.bare(cores["one_worker"][0]))
        for name, held in cores.items():
            runs[name].append(scoring.through(pools[name], held))
    assert len({run["sha256"] for name in cores for run in runs[name]}) == 1, "the sums depend on the number of workers"
    rate, cpu = (
        {name: statistics.median(run[key] for run in found) for name, found in runs.items()}
        for key in ("rows_per_s", "cpu_s")
    )
    return {
        **{f"{name}_rows_per_s": value for name, value in rate.items()},
        "ratio_to_bare": rate["one_worker"] / rate["bare"],
        "cpu_ratio_to_bare": cpu["bare"] / cpu["one_worker"],
        "ratio_of_two_workers": rate["two_workers"] / rate["one_worker"],
        "start_up_s": begin["one_worker"],
        "begin_pass_s": statistics.median(run["begin_s"] for run in runs["one_worker"]),
        "commits": runs["one_worker"][0]["commits"],
    }


if __name__ == "__main__":
    print(json.dumps(tyro.cli(measure), indent=1))
