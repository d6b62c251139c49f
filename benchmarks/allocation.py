"""What it costs that malloc gives freed memory back to the kernel: `python -m benchmarks.allocation`.

given_back   forwards of one network as glibc's malloc has it by default
kept         the same in a worker (`execution.machine.keep_freed_memory`)

Each in a process of its own, in turns. Seconds of the CPU, the kernel's among them, are what counts: a neighbour on the machine cannot change
which pages are cleared.
"""

from __future__ import annotations

import json
import resource
import statistics
from typing import Any

import torch
import tyro

from benchmarks.measuring import in_fresh_process, versions
from pipeline.execution.machine import keep_freed_memory
from pipeline.models import zoo


def measure(
    model: str = "tf_efficientnet_lite0", size: int = 128, rows: int = 64, forwards: int = 5, turns: int = 3
) -> dict[str, Any]:
    """CPU seconds of `forwards` forwards both ways, the median of turns, and their ratio."""
    found: dict[str, list[dict[str, float]]] = {"given_back": [], "kept": []}
    for _ in range(turns):
        for name, several in found.items():
            several.append(in_fresh_process(_forwards, name == "kept", model, size, rows, forwards))
    medians = {
        name: {key: statistics.median(one[key] for one in several) for key in several[0]}
        for name, several in found.items()
    }
    return {
        **medians,
        "speed_ratio": medians["given_back"]["cpu_s"] / medians["kept"]["cpu_s"],
        "versions": versions("torch", "timm"),
    }


def _forwards(keep: bool, model: str, size: int, rows: int, forwards: int) -> dict[str, float]:
    torch.set_num_threads(1)
    if keep:
        keep_freed_memory()
    network = zoo.build(model).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(rows, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        network(images)
        before = resource.getrusage(resource.RUSAGE_SELF)
        for _ in range(forwards):
            network(images)
        after = resource.getrusage(resource.RUSAGE_SELF)
    kernel_s = after.ru_stime - before.ru_stime
    return {
        "cpu_s": after.ru_utime - before.ru_utime + kernel_s,
        "kernel_s": kernel_s,
        "peak_mb": after.ru_maxrss / 1e3,
    }


if __name__ == "__main__":
    print(json.dumps(tyro.cli(measure), indent=1))
