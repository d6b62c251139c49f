"""Peak memory of each of two workers that train one network: `python -m benchmarks.sharding`.

The same training twice, from the same file: each worker holds the network (DDP), or both hold it together (FSDP2). A ViT with few rows
in a batch, so that parameters, gradients and AdamW's two moments are what needs memory. The peak of resident memory counts above what a
worker needs before it has a network. The result is written to a file; with `--checkpoint` a checkpoint before it, too, for which the
worker that holds all copies all.
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

from benchmarks.measuring import in_fresh_process, peak_memory, versions
from pipeline import artifacts
from pipeline.training.loop import train
from pipeline.training.settings import TrainSettings
from pipeline.training.sharding import Stored, skeleton_of

WORKERS = 2
SIZE, CLASSES = 32, 10


def measure(
    width: int = 768, depth: int = 12, steps: int = 3, rows: int = 4, checkpoint: bool = False
) -> dict[str, Any]:
    """Extra memory in MB of each worker, held whole and sharded, and the largest sharded over the largest whole one.

    Args:
        width, depth: of the ViT; 768 and 12 are a ViT-B.
        steps: of AdamW.
        rows: in a global batch, 32 x 32 pixels each.
        checkpoint: after the last step.
    """
    with tempfile.TemporaryDirectory() as folder:
        parameters = in_fresh_process(_write, folder, width, depth)
        peaks = {
            name: _train(folder, steps, rows, shard_over, checkpoint)
            for name, shard_over in (("whole", 1), ("sharded", WORKERS))
        }
    largest = {name: max(worker["extra_mb"] for worker in workers) for name, workers in peaks.items()}
    return {
        "parameters": parameters,
        "network_mb": parameters * 4 / 1e6,
        "workers": peaks,
        "ratio": largest["sharded"] / largest["whole"],
        "versions": versions("torch", "timm"),
    }


def _network(width: int, depth: int) -> nn.Module:
    return VisionTransformer(SIZE, 8, embed_dim=width, depth=depth, num_heads=width // 64, num_classes=CLASSES)


def _write(folder: str, width: int, depth: int) -> int:
    """The network's file and its skeleton, in a process of its own: no worker ever holds more than it must."""
    torch.manual_seed(0)
    network = _network(width, depth)
    artifacts.write_tensors(f"{folder}/network.safetensors", network.state_dict())
    torch.save(skeleton_of(network), f"{folder}/skeleton.pt")
    return sum(parameter.numel() for parameter in network.parameters())


def _train(folder: str, steps: int, rows: int, shard_over: int, checkpoint: bool) -> list[dict[str, float]]:
    where = Path(folder) / str(shard_over)
    where.mkdir()
    mp.spawn(_work, args=(folder, str(where), steps, rows, shard_over, checkpoint), nprocs=WORKERS)
    return [json.loads((where / f"{rank}.json").read_text()) for rank in range(WORKERS)]


def _work(rank: int, folder: str, where: str, steps: int, rows: int, shard_over: int, checkpoint: bool) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
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


class _Batches:
    """The same few made-up rows in every step."""

    def __init__(self, rows: int, steps: int) -> None:
        self.rows, self.steps = rows, steps

    def __call__(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(start_step, self.steps):
            yield torch.zeros(self.rows, 3, SIZE, SIZE), torch.zeros(self.rows, dtype=torch.int64)


if __name__ == "__main__":
    print(json.dumps(tyro.cli(measure), indent=1))
