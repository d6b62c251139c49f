"""Measured time of a forward: several models in turns, so that a busy or throttled machine is unfair to none."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

WARMUP_S = 0.5  # memory pools, algorithm choice and clocks settle in this time
MIN_WARMUP_RUNS = 2


def measure_latency(
    models: Mapping[str, nn.Module],
    input_shape: Sequence[int],
    *,
    batch_sizes: Sequence[int] = (1, 32),
    device: torch.device | None = None,
    runs: int = 30,
) -> dict[str, Any]:
    """Median time of an eval forward in float32, channels_last.

    Args:
        models: by name; copied. One for which the device has no room beside those before it is left out.
        input_shape: of one row, for example (3, 224, 224).
        batch_sizes: rows in one forward.
        device: CPU by default, with as many threads as torch has now.
        runs: timed forwards of each model and batch size; the models take turns.

    Returns:
        {"device": name, "threads": count, "runs": runs,
         "batch": {"1": {"<model>": {"median_ms", "min_ms", "max_ms", "rows_per_s"}}}}: plain values for JSON.
    """
    device = device or torch.device("cpu")
    on_cuda = device.type == "cuda"
    memory_format = torch.channels_last if len(input_shape) == 3 else torch.contiguous_format
    placed: dict[str, nn.Module] = {}
    for name, model in models.items():
        with suppress(torch.OutOfMemoryError):
            placed[name] = copy.deepcopy(model).eval().to(device).to(memory_format=memory_format)
    generator = torch.Generator().manual_seed(0)
    by_batch: dict[str, Any] = {}
    for size in batch_sizes:
        images = torch.randn(size, *input_shape, generator=generator).to(device)
        images = images.contiguous(memory_format=memory_format)
        forwards = {name: partial(_forward_ms, model, images, device) for name, model in placed.items()}
        by_batch[str(size)] = in_turns(forwards, size, runs)
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "threads": torch.get_num_threads(),
        "runs": runs,
        "batch": by_batch,
    }


@torch.inference_mode()
def in_turns(forwards: Mapping[str, Callable[[], float]], num_rows: int, runs: int) -> dict[str, Any]:
    """Warm each up, then let them take turns. A forward returns its milliseconds; one that has no room is left out.

    Returns:
        By name: median_ms, min_ms and max_ms of `runs` forwards, and rows_per_s.
    """
    times: dict[str, list[float]] = {}
    for name, forward in forwards.items():
        started, count = time.perf_counter(), 0
        with suppress(torch.OutOfMemoryError):
            while count < MIN_WARMUP_RUNS or time.perf_counter() - started < WARMUP_S:
                forward()
                count += 1
            times[name] = []
    for _ in range(runs):
        for name, values in times.items():
            values.append(forwards[name]())
    return {name: _summary(values, num_rows) for name, values in times.items()}


def _summary(milliseconds: Sequence[float], rows: int) -> dict[str, float]:
    median = statistics.median(milliseconds)
    return {
        "median_ms": median,
        "min_ms": min(milliseconds),
        "max_ms": max(milliseconds),
        "rows_per_s": 1000 * rows / median,
    }


def _forward_ms(model: nn.Module, images: Tensor, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        model(images)
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end))
    started = time.perf_counter()
    model(images)
    return 1000 * (time.perf_counter() - started)
