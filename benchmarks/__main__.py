"""python -m benchmarks: prints a table and writes benchmarks/results.json.

gates      channel-gate scoring against a plain forward + backward with weight gradients, ResNet-50 at 64 px, one thread
selection  exact global threshold of 20 million scores against sorting them with torch
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from pipeline.models import zoo
from pipeline.models.trace import propagate
from pipeline.pruning.selection import kth_score
from pipeline.saliency.statistics import GateStatistics


def in_turns(ours: Callable[[], object], peer: Callable[[], object], runs: int = 7) -> dict[str, float]:
    """Median seconds of both, measured alternately after one warm-up each."""
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for turn in range(runs + 1):
        for name, work in (("ours", ours), ("peer", peer)):
            started = time.perf_counter()
            work()
            if turn:
                times[name].append(time.perf_counter() - started)
    ours_s, peer_s = (statistics.median(times[name]) for name in ("ours", "peer"))
    return {"ours_s": ours_s, "peer_s": peer_s, "ratio": ours_s / peer_s}


def gates() -> dict[str, float]:
    images = torch.randn(16, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (16,))
    scored, plain = zoo.build("resnet50"), zoo.build("resnet50").eval().to(memory_format=torch.channels_last)
    task = GateStatistics(scored, propagate(scored, images[:1]))
    task.to(torch.device("cpu"), torch.channels_last)

    def step() -> None:
        plain.zero_grad()
        F.cross_entropy(plain(images), labels, reduction="sum").backward()

    return in_turns(lambda: task(images, labels), step)


def selection() -> dict[str, float]:
    scores = torch.rand(20_000_000, generator=torch.Generator().manual_seed(0))
    k = len(scores) // 2
    from_below = len(scores) - k + 1
    assert kth_score(lambda: [scores], k).threshold == scores.kthvalue(from_below).values.item()
    return in_turns(lambda: kth_score(lambda: [scores], k), lambda: scores.kthvalue(from_below), runs=3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {"gates": gates(), "selection": selection()}
    for name, values in results.items():
        print(f"{name:10s} ours {values['ours_s']:.3f} s   peer {values['peer_s']:.3f} s   ratio {values['ratio']:.2f}")
    Path(__file__).with_name("results.json").write_text(json.dumps(results, indent=1) + "\n")
