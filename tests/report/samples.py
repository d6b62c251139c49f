"""Made-up summaries in realistic shapes: a deep network, a small one, and one whose stages were mostly switched off."""

from __future__ import annotations

import math
import random
from typing import Any

ENVIRONMENT = {
    "command": "python -m jobs.prune_resnet152 --data.train 's3://bucket/imagenet/train/*.parquet' "
    "--budget.macs 0.5 --run-dir s3://bucket/runs/r152",
    "python": "3.11.7",
    "platform": "Linux-6.8.0-x86_64-with-glibc2.36",
    "processor": "AMD EPYC 7763 64-Core Processor",
    "cpus": 64,
    "device": "cuda",
    "workers": 8,
    "versions": {"torch": "2.14.1", "torchvision": "0.29.1", "timm": "1.0.31"},
    "ray": "2.60.0",
}


def digest(seed: int) -> str:
    return f"{random.Random(seed).getrandbits(256):064x}"


def history(
    steps: int, every: int, start: float, end: float, top1: tuple[float, float] | None = None
) -> list[dict[str, Any]]:
    noise, found = random.Random(0), []
    for step in range(every, steps + 1, every):
        part = step / steps
        loss = end + (start - end) * math.exp(-4 * part) + noise.gauss(0, 0.02)
        record = {"step": step, "epoch": int(part * 8), "loss": loss, "lr": 0.1 * (1 + math.cos(math.pi * part)) / 2}
        if top1 and len(found) % 10 == 9:
            record["top1"] = top1[1] - (top1[1] - top1[0]) * math.exp(-5 * part)
        found.append(record)
    return found


def stages(seconds: dict[str, float | None]) -> list[dict[str, Any]]:
    at, found = 1.79e9, []
    for name, took in seconds.items():
        done = took is not None
        found.append(
            {
                "name": name,
                "state": "done" if done else "running",
                "seconds": took,
                "started": at,
                "finished": at + took if done else None,
            }
        )
        at += took or 0.0
    return found


def resnet152() -> dict[str, Any]:
    """105 groups, a thousand classes, everything measured."""
    rng = random.Random(1)
    groups = [{"name": "conv1", "size": 64, "kept": 56}]
    for layer, (blocks, width) in enumerate(((3, 64), (8, 128), (36, 256), (3, 512)), start=1):
        for block in range(blocks):
            for conv in (1, 2):
                share = min(1.0, max(0.1, rng.gauss(0.75 - 0.12 * layer + 0.25 * (block == 0), 0.16)))
                kept = max(8, int(width * share) // 8 * 8)
                groups.append({"name": f"layer{layer}.{block}.conv{conv}", "size": width, "kept": kept})
        groups.append(
            {"name": f"layer{layer}.0.downsample.0", "size": width * 4, "kept": width * (4 if layer == 4 else 3)}
        )
    frozen = [
        {
            "group": f"blocks.{i}.attn.qkv",
            "size": 768,
            "operation": "aten.view",
            "where": f"blocks.{i}.attn (timm/models/vision_transformer.py:{96 + i})",
            "reason": "a reshape mixes these channels with positions",
        }
        for i in range(12)
    ] + [
        {
            "group": "conv1.input",
            "size": 3,
            "operation": "aten.convolution",
            "where": "conv1 (timm/models/resnet.py:777)",
            "reason": "reads the network's input",
        },
        {
            "group": "fc",
            "size": 1000,
            "operation": "none",
            "where": "fc",
            "reason": "no convolution or linear layer reads these channels",
        },
    ]
    classes = []
    for c in range(1000):
        dense = min(1.0, max(0.2, rng.gauss(0.82, 0.13)))
        pruned = min(1.0, max(0.0, dense + rng.gauss(-0.007, 0.03)))
        classes.append(
            {"class": f"n{1440764 + 7919 * c:08d}", "dense": round(50 * dense) / 50, "pruned": round(50 * pruned) / 50}
        )
    return {
        "model": "resnet152.tv2_in1k",
        "dense": {
            "top1": 0.82284,
            "top5": 0.96002,
            "loss": 0.8752,
            "agreement": 1.0,
            "params": 60192808,
            "macs": 11513624576,
            "latency_ms": {"1": 9.84, "32": 41.7},
        },
        "pruned": {
            "top1_before_recovery": 0.6431,
            "top1": 0.81572,
            "top5": 0.95711,
            "loss": 0.9033,
            "agreement": 0.9127,
            "params": 31150312,
            "macs": 5756811000,
            "latency_ms": {"1": 9.21, "32": 25.3},
        },
        "controls": {
            "random": {
                "top1_before_recovery": 0.0013,
                "top1": None,
                "params": 33001204,
                "macs": 5756802224,
                "latency_ms": {"1": 9.2, "32": 24.9},
                "scope": "layer",
            },
            "magnitude": {
                "top1_before_recovery": 0.4178,
                "top1": 0.8061,
                "params": 33001204,
                "macs": 5756802224,
                "latency_ms": {"1": 9.3, "32": 25.1},
                "scope": "layer",
            },
        },
        "saliency": {
            "criterion": "taylor",
            "rows": 131072,
            "units": 256,
            "workers": 8,
            "sha256": digest(1),
            "seconds": 214.6,
            "rows_per_s": 610.8,
            "skipped": 3,
            "commits": 31,
            "lost_workers": 1,
            "resumed_units": 40,
        },
        "plan": {"sha256": digest(2), "budget": {"macs": 0.5}, "scope": "global", "groups": groups},
        "masks": {"sha256": digest(3)},
        "verify": {"max_abs_diff": 3.1e-6, "max_rel_diff": 4.4e-7, "rows": 16},
        "frozen": frozen,
        "recover": {
            "epochs": 8,
            "seconds": 26412.0,
            "rows_per_s": 3101.0,
            "history": history(40000, 50, 2.3, 1.05, (0.7, 0.8157)),
        },
        "stages": stages(
            {
                "dense": 12.4,
                "trace": 6.1,
                "score": 219.0,
                "plan": 2.2,
                "cut": 9.4,
                "calibrate": 61.0,
                "evaluate-before": 142.8,
                "recover": 26420.0,
                "evaluate-after": 71.3,
                "latency": 38.0,
                "export": 3.4,
            }
        ),
        "bad_rows": [
            {
                "file": f"train-{i:05d}-of-01024.parquet",
                "row_group": i,
                "row": 17 * i,
                "cause": "cannot identify image file: truncated JPEG",
            }
            for i in (3, 412, 977)
        ],
        "per_class": classes,
        "data": {"train": digest(4), "val": digest(5), "val_rows": 50000},
        "environment": ENVIRONMENT,
    }


def digits() -> dict[str, Any]:
    """Nine groups, ten classes, on a laptop."""
    widths = [(24, 24), (32, 16), (64, 64), (64, 32), (64, 48), (128, 72), (256, 96), (512, 136), (512, 488)]
    names = [
        "conv1.0",
        "conv1.3",
        "conv1.6",
        "layer1.0.conv1",
        "layer1.0.conv2",
        "layer2.0.conv1",
        "layer3.0.conv1",
        "layer4.0.conv1",
        "layer4.0.conv2",
    ]
    names_of = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    dense = [0.943, 1.0, 0.971, 0.946, 1.0, 0.973, 1.0, 0.972, 0.914, 0.944]
    pruned = [0.943, 1.0, 1.0, 0.946, 1.0, 1.0, 1.0, 0.972, 0.857, 0.972]
    return {
        "model": "resnet10t",
        "dense": {
            "top1": 0.9667,
            "top5": 1.0,
            "loss": 0.2258,
            "agreement": 1.0,
            "params": 4927618,
            "macs": 22387712,
            "latency_ms": {"1": 3.86, "32": 21.46},
            "onnx_latency_ms": {"1": 1.12, "32": 17.9},
        },
        "pruned": {
            "top1_before_recovery": 0.8917,
            "top1": 0.9694,
            "top5": 1.0,
            "loss": 0.2211,
            "agreement": 0.9889,
            "params": 2167446,
            "macs": 11162624,
            "latency_ms": {"1": 2.63, "32": 15.15},
            "onnx_latency_ms": {"1": 0.61, "32": 9.8},
        },
        "controls": {
            "random": {
                "top1_before_recovery": 0.7389,
                "params": 2342062,
                "macs": 11180480,
                "latency_ms": {"1": 2.24, "32": 14.61},
            },
            "magnitude": {
                "top1_before_recovery": 0.8111,
                "params": 2342062,
                "macs": 11180480,
                "latency_ms": {"1": 2.23, "32": 14.83},
            },
        },
        "saliency": {
            "criterion": "taylor",
            "rows": 1437,
            "units": 23,
            "workers": 2,
            "sha256": digest(6),
            "seconds": 8.1,
            "rows_per_s": 176.8,
            "skipped": 0,
        },
        "plan": {
            "sha256": digest(7),
            "budget": {"macs": 0.5},
            "scope": "global",
            "groups": [{"name": n, "size": size, "kept": kept} for n, (size, kept) in zip(names, widths, strict=True)],
        },
        "masks": {"sha256": digest(8)},
        "compression": {
            "rows": 360,
            "calibration_rows": 512,
            "weight_bits": 8,
            "runtime": "onnxruntime 1.32.0",
            "threads": 1,
            "runs": 30,
            "sha256": digest(11),
            "dense": {"bytes": 19710472, "top1": 0.9667, "agreement": 0.9889, "latency_ms": {"1": 1.12, "32": 17.9}},
            "cut": {"bytes": 8669784, "top1": 0.9694, "agreement": 1.0, "latency_ms": {"1": 0.61, "32": 9.8}},
            "cut_int8": {"bytes": 2228913, "top1": 0.9667, "agreement": 0.9917, "latency_ms": {"1": 0.31, "32": 4.9}},
        },
        "verify": {"max_abs_diff": 1.19e-6, "max_rel_diff": 3.4e-7, "rows": 16},
        "frozen": [
            {
                "group": "conv1.0.input",
                "size": 3,
                "operation": "aten.convolution",
                "where": "conv1.0 (timm/models/resnet.py:777)",
                "reason": "reads the network's input",
            },
            {
                "group": "fc",
                "size": 10,
                "operation": "none",
                "where": "fc",
                "reason": "no convolution or linear layer reads these channels",
            },
        ],
        "train": {"epochs": 8, "seconds": 27.1, "rows_per_s": 508.1, "history": history(176, 5, 2.3, 0.55)},
        "recover": {"epochs": 4, "seconds": 9.8, "rows_per_s": 555.3, "history": history(88, 5, 0.56, 0.22)},
        "stages": stages(
            {
                "dense": 51.6,
                "trace": 0.5,
                "score": 8.2,
                "plan": 0.3,
                "cut": 0.3,
                "calibrate": 2.2,
                "evaluate-before": 1.2,
                "recover": 28.7,
                "evaluate-after": 5.8,
                "latency": 7.1,
                "export": 0.2,
            }
        ),
        "bad_rows": [],
        "per_class": [
            {"class": f"{i}: {name}", "dense": d, "pruned": p}
            for i, (name, d, p) in enumerate(zip(names_of, dense, pruned, strict=True))
        ],
        "data": {"train": digest(9), "val": digest(10), "val_rows": 360},
        "environment": {
            **ENVIRONMENT,
            "command": "python -m jobs.prune_demo",
            "device": "cpu",
            "cpus": 2,
            "workers": 2,
        },
    }


def sparse() -> dict[str, Any]:
    """No recovery, no controls, no latency, a stage that has not ended; several parts not even named."""
    full = digits()
    return {
        "model": "resnet10t",
        "dense": {"top1": 0.9667, "params": 4927618, "macs": 22387712},
        "pruned": {
            "top1_before_recovery": 0.8917,
            "top1": None,
            "params": 2167446,
            "macs": 11162624,
            "latency_ms": None,
        },
        "saliency": {"criterion": "magnitude", "sha256": None},
        "plan": full["plan"],
        "recover": None,
        "frozen": [],
        "stages": stages({"dense": 51.6, "trace": 0.5, "plan": 0.3, "cut": 0.3, "evaluate-before": None}),
    }


SAMPLES = {"resnet152": resnet152, "digits": digits, "sparse": sparse}
