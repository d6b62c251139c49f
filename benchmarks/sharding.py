"""Peak memory of each of two workers that hold one network together (FSDP2), beside workers that hold it whole: `python -m benchmarks.sharding`.

training   the same steps from the same file, by DDP and in rows; the result is written to a file. With `--checkpoint` a checkpoint before it,
           too, for which the worker that holds all copies all.
cutting    a plan by magnitude to half the parameters, and the cut, in one process, beside the size of what stays.
scoring    the gates and three statistics of every weight for the same rows, by one worker and by a team of two, until their commit is written.

A ViT with few rows in a batch, so that weights, gradients, AdamW's two moments and sums are what needs memory. The peak of resident
memory counts above what a worker needs before it has a network. All give freed memory back at once, as teams do: it is what they hold that
counts, not what malloc keeps.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.measuring import in_fresh_process, peak_memory, peak_of_its_own, photograph, versions, write_rows
from pipeline import artifacts
from pipeline.data.batches import Decoder
from pipeline.data.rows import open_source
from pipeline.data.units import Units
from pipeline.execution.ledger import Ledger
from pipeline.execution.machine import free_port, give_back_memory
from pipeline.execution.team import Member
from pipeline.execution.worker import Pass, UnitWorker
from pipeline.models.graph import Graph
from pipeline.models.sharding import Stored, mapped, skeleton_of
from pipeline.models.trace import propagate
from pipeline.pruning.allocation import plan
from pipeline.pruning.plan import Budget
from pipeline.pruning.surgery import cut
from pipeline.saliency.channel_rules import magnitude_l2
from pipeline.saliency.exact import Grid
from pipeline.saliency.statistics import GateStatistics
from pipeline.training.loop import train
from pipeline.training.settings import TrainSettings

WORKERS = 2
SIZE, CLASSES = 32, 10
SCORED_ROWS = 16
"""Two units of two micro-batches."""


def measure(
    width: int = 768, depth: int = 12, steps: int = 3, rows: int = 4, checkpoint: bool = False
) -> dict[str, Any]:
    """Extra memory in MB of each worker, held whole and sharded, and the largest sharded over the largest whole one; of both kinds of work.

    Args:
        width, depth: of the ViT; 768 and 12 are a ViT-B.
        steps: of AdamW.
        rows: in a global batch, 32 x 32 pixels each.
        checkpoint: after the last step.
    """
    with tempfile.TemporaryDirectory() as folder:
        parameters = in_fresh_process(_write, folder, width, depth)
        training = {
            name: _train(folder, steps, rows, shard_over, checkpoint)
            for name, shard_over in (("whole", 1), ("sharded", WORKERS))
        }
        cutting = in_fresh_process(_cut, folder)
        scoring = {name: _score(folder, size) for name, size in (("whole", 1), ("sharded", WORKERS))}
    return {
        "parameters": parameters,
        "network_mb": parameters * 4 / 1e6,
        "training": _compared(training),
        "scoring": _compared(scoring),
        "cutting": cutting,
        "versions": versions("torch", "timm"),
    }


def _compared(workers: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    largest = {name: max(worker["extra_mb"] for worker in several) for name, several in workers.items()}
    return {"workers": workers, "ratio": largest["sharded"] / largest["whole"]}


def _network(width: int, depth: int) -> nn.Module:
    return VisionTransformer(SIZE, 8, embed_dim=width, depth=depth, num_heads=width // 64, num_classes=CLASSES)


def _write(folder: str, width: int, depth: int) -> int:
    """The network's file and its skeleton, in a process of its own: no worker ever holds more than it must."""
    torch.manual_seed(0)
    network = _network(width, depth)
    artifacts.write_tensors(f"{folder}/network.safetensors", network.state_dict())
    torch.save(skeleton_of(network), f"{folder}/skeleton.pt")
    Path(folder, "graph.json").write_text(propagate(network, torch.zeros(1, 3, SIZE, SIZE)).to_json())
    rows = ((photograph(i, SIZE), i % CLASSES) for i in range(SCORED_ROWS))
    write_rows(Path(folder, "rows.parquet"), rows)
    return sum(parameter.numel() for parameter in network.parameters())


def _train(folder: str, steps: int, rows: int, shard_over: int, checkpoint: bool) -> list[dict[str, float]]:
    where = Path(folder) / str(shard_over)
    where.mkdir()
    mp.spawn(_work, args=(folder, str(where), steps, rows, shard_over, checkpoint), nprocs=WORKERS)
    return [json.loads((where / f"{rank}.json").read_text()) for rank in range(WORKERS)]


def _work(rank: int, folder: str, where: str, steps: int, rows: int, shard_over: int, checkpoint: bool) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    give_back_memory()
    options: dict[str, Any] = {"rank": rank, "world_size": WORKERS, "timeout": timedelta(minutes=30)}
    dist.init_process_group("gloo", init_method=f"file://{where}/store", **options)
    network = Stored(torch.load(f"{folder}/skeleton.pt", weights_only=False), f"{folder}/network.safetensors")
    settings = TrainSettings(epochs=1, batch_size=rows, lr=1e-4, optimizer="adamw", checkpoint_every_steps=steps)
    dist.barrier()
    started = time.perf_counter()
    with peak_memory() as peak:
        train(
            network,
            None,
            _Batches(rows // WORKERS, steps),
            settings,
            steps_per_epoch=steps,
            rank=rank,
            world_size=WORKERS,
            shard_over=shard_over,
            checkpoint_dir=f"{where}/checkpoints" if checkpoint else None,
            result_path=f"{where}/result.safetensors",
        )
    Path(where, f"{rank}.json").write_text(json.dumps({**peak, "seconds": time.perf_counter() - started}))
    dist.destroy_process_group()


def _cut(folder: str) -> dict[str, float]:
    """As the driver does it: the weights of the dense network stay in their file."""
    network = Stored(torch.load(f"{folder}/skeleton.pt", weights_only=False), f"{folder}/network.safetensors")
    graph = Graph.from_json(Path(folder, "graph.json").read_text())
    give_back_memory()
    with peak_of_its_own() as peak:
        dense = mapped(network)
        saliency = magnitude_l2(graph, {}, dense.state_dict(), 0)
        small = cut(dense, plan(graph, saliency, Budget(params=0.5), scope="layer"))
    kept_mb = sum(parameter.numel() for parameter in small.parameters()) * 4 / 1e6
    return {**peak, "kept_mb": kept_mb, "ratio": peak["extra_mb"] / kept_mb}


# --- scoring ----------------------------------------------------------------------------------------------------------


def _score(folder: str, size: int) -> list[dict[str, float]]:
    where = Path(folder) / f"score-{size}"
    where.mkdir()
    address = f"127.0.0.1:{free_port()}"
    mp.spawn(_score_as, args=(folder, str(where), size, address), nprocs=size)
    return [json.loads((where / f"{rank}.json").read_text()) for rank in range(size)]


def _score_as(rank: int, folder: str, where: str, size: int, address: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    give_back_memory()
    cpu = torch.device("cpu")
    worker = UnitWorker(cpu, 1) if size == 1 else Member(cpu, 1, rank, size, address)
    network = Stored(torch.load(f"{folder}/skeleton.pt", weights_only=False), f"{folder}/network.safetensors")
    graph = Graph.from_json(Path(folder, "graph.json").read_text())
    source = open_source(f"{folder}/rows.parquet")
    units = Units(source.row_groups, SCORED_ROWS // 2)
    task = GateStatistics(network, graph, weights=True)
    ledger = Ledger(where, len(units), "benchmark")
    decoder = Decoder(SIZE, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)
    started = time.perf_counter()
    with peak_memory() as peak:
        worker.load(Pass(task, source, units, decoder, ledger, None, SCORED_ROWS // 4, CLASSES, "stop"))
        pilot, processor = worker.pilot()
        grid = Grid.from_pilot(pilot, num_addends=len(units), segments=task.segments)
        worker.fix_grid(grid)
        if rank == 0:
            ledger.fix_grid(grid, processor)
        if isinstance(worker, Member):
            dist.barrier()
        worker.work(range(len(units)))
    Path(where, f"{rank}.json").write_text(json.dumps({**peak, "seconds": time.perf_counter() - started}))


# --- training ---------------------------------------------------------------------------------------------------------


class _Batches:
    """The same few made-up rows in every step."""

    def __init__(self, rows: int, steps: int) -> None:
        self.rows, self.steps = rows, steps

    def __call__(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(start_step, self.steps):
            yield torch.zeros(self.rows, 3, SIZE, SIZE), torch.zeros(self.rows, dtype=torch.int64)


if __name__ == "__main__":
    print(json.dumps(tyro.cli(measure), indent=1))
