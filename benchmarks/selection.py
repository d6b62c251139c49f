"""Global selection beside torch.nn.utils.prune, and over a billion scores: `python -m benchmarks.selection`.

masks    pipeline: the exact threshold and bool masks of all tensors; torch: prune.global_unstructured with L1Unstructured, on the same
         numbers. Extra memory is the peak above what the process had with the scores in memory. It includes what each returns: bool
         masks here; float masks and masked weights there.
billion  kth_score over shards that are made anew, from their seeds, in each pass; making them is timed by itself as well.

Each runs in a fresh process, on one thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn.utils import prune

from benchmarks.measuring import in_fresh_process, one_thread, peak_memory, versions
from pipeline.pruning.selection import global_masks, kth_score

SHARD = 10_000_000
"""Scores in one shard of the billion."""


def measure(
    scores: int = 100_000_000, tensors: int = 100, billion: int = 1_000_000_000, turns: int = 1
) -> dict[str, Any]:
    """Seconds and MB of each way, of several turns the best; half of the scores are kept.

    Args:
        scores: in all tensors together, float32.
        tensors: among which they are divided.
        billion: scores of the second part, in shards of ten million; 0 leaves it out.
        turns: fresh processes of each way.
    """
    ours, peer = [], []
    for _ in range(turns):
        ours.append(in_fresh_process(_our_masks, scores, tensors))
        peer.append(in_fresh_process(_torch_masks, scores, tensors))
        assert ours[-1]["kept"] == peer[-1]["kept"] == scores // 2
    mine, theirs = (min(runs, key=lambda run: run["seconds"]) for runs in (ours, peer))
    return {
        "masks": {
            "scores": scores,
            "ours": mine,
            "torch": theirs,
            "speed_ratio": theirs["seconds"] / mine["seconds"],
            "memory_ratio": mine["extra_mb"] / theirs["extra_mb"],
        },
        **({"billion": in_fresh_process(_kth_of_shards, billion)} if billion else {}),
        "versions": versions("torch", "numpy"),
    }


def _our_masks(num_scores: int, num_tensors: int) -> dict[str, float]:
    scores = _tensors(num_scores, num_tensors)
    with one_thread(), peak_memory() as peak:
        started = time.perf_counter()
        masks = global_masks(scores, num_scores // 2)
        seconds = time.perf_counter() - started
    kept = sum(int(mask.sum()) for mask in masks.values())
    return {"seconds": seconds, **peak, "output_mb": sum(mask.nbytes for mask in masks.values()) / 1e6, "kept": kept}


def _torch_masks(num_scores: int, num_tensors: int) -> dict[str, float]:
    layers = nn.Module()
    for name, weight in _tensors(num_scores, num_tensors).items():
        layers.add_module(name, nn.Module())
        layers.get_submodule(name).register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    weights = [(layer, "weight") for layer in layers.children()]
    with one_thread(), peak_memory() as peak:
        started = time.perf_counter()
        prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=num_scores - num_scores // 2)
        seconds = time.perf_counter() - started
    kept = sum(int(mask.sum(dtype=torch.int64)) for mask in layers.buffers())
    output = sum(layer.weight.nbytes + layer.weight_mask.nbytes for layer, _ in weights)
    return {"seconds": seconds, **peak, "output_mb": output / 1e6, "kept": kept}


def _tensors(num_scores: int, num_tensors: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [len(part) for part in torch.empty(num_scores, device="meta").tensor_split(num_tensors)]
    return {f"layer{i:04d}": torch.rand(size, generator=generator) for i, size in enumerate(sizes)}


def _kth_of_shards(num_scores: int) -> dict[str, float]:
    num_shards = -(-num_scores // SHARD)

    def shards() -> Iterator[Tensor]:
        for seed in range(num_shards):
            size = min(SHARD, num_scores - seed * SHARD)
            yield torch.rand(size, generator=torch.Generator().manual_seed(seed))

    with one_thread():
        with peak_memory() as peak:
            started = time.perf_counter()
            found = kth_score(shards, num_scores // 2)
            seconds = time.perf_counter() - started
        above = sum(int((shard > found.threshold).sum()) for shard in shards())
        assert above == found.num_above < num_scores // 2 <= above + found.num_ties
        started = time.perf_counter()
        for _ in shards():
            pass
        making_s = time.perf_counter() - started
    return {
        "scores": num_scores,
        "seconds": seconds,
        "seconds_without_making": seconds - 2 * making_s,  # float32 takes two passes
        **peak,
        "shard_mb": 4 * SHARD / 1e6,
    }


if __name__ == "__main__":
    print(json.dumps(tyro.cli(measure), indent=1))
