"""Pruning together with quantisation: the pruned network in INT8, what that costs in accuracy, what it gains in size and time."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import artifacts
from pipeline.data.batches import Decoder, unit_batches
from pipeline.data.rows import Source
from pipeline.data.units import Units
from pipeline.export import int8, onnx
from pipeline.models.sharding import Network
from pipeline.run import Run
from pipeline.stages.results import evaluate_networks

FILE = "model-int8.onnx"
ROWS_AT_ONCE = 32
"""Of calibration, and in one unit of it: so many neighbours are read together. Changes no range."""


def quantise(run: Run) -> None:
    """RUN/model/model-int8.onnx, RUN/evaluation/int8.json, RUN/compression.json; if INT8 is asked for."""
    if run.config.export.int8:
        write_int8(run)
        evaluate_int8(run)
        compare(run)


def write_int8(run: Run) -> None:
    """RUN/model/model-int8.onnx: the ranges of its activations are those of training rows, spread over the data."""
    weights, rows = run.result, run.train_rows
    units = Units(rows.row_groups, ROWS_AT_ONCE, min(run.config.export.int8_rows, rows.num_rows))
    inputs = {
        **_networks(run),
        "rows": rows.fingerprint,
        "units": units.describe(),
        "input": vars(run.input),
        "settings": int8.settings(),
    }

    def work() -> None:
        policy = run.config.data.on_bad_row
        reading = (rows, units, run.input.decoder, run.num_classes, policy)
        found = run.pool.call(_write, run.network(weights, plan="ours"), reading, run.path("model", FILE))
        run.say(f"{FILE}: weights of {found.weight_bits} bits, ranges of {found.rows} rows")

    run.stage("export-int8", inputs, run.path("model", FILE), work)


def evaluate_int8(run: Run) -> None:
    """RUN/evaluation/int8.json: dense, pruned and quantised network on all validation rows, in the pass that evaluates any network."""
    weights = run.result

    def load() -> dict[str, Network]:
        file = onnx.OnnxNetwork(artifacts.read_bytes(run.path("model", FILE)))
        return {"dense": run.first.sent("dense"), "cut": run.sent(weights, plan="ours"), "cut_int8": file}

    made_from = {**_networks(run), "int8": int8_sha256(run), "settings": int8.settings()}
    evaluate_networks(run, "evaluate-int8", "int8", load, reference="cut", weights=made_from)


def compare(run: Run) -> None:
    """RUN/compression.json: size on disk, accuracy, and ONNX Runtime's time of the dense network, the pruned one, and that in INT8."""
    settings = run.config.evaluate
    batches, weights = (1, settings.latency_batch), run.result
    inputs = {
        **_networks(run),
        "int8": int8_sha256(run),
        "settings": int8.settings(),
        "image_size": run.input.size,
        "threads": run.config.workers.threads,
        "batches": batches,
        "runs": settings.latency_runs,
    }

    def work() -> None:
        models = {"dense": run.first.network("dense"), "cut": run.network(weights, plan="ours")}
        data = artifacts.read_bytes(run.path("model", FILE))
        sizes, times = run.pool.call(_measure, models, data, run.input.size, batches, settings.latency_runs)
        evaluated, made = artifacts.read_json(run.path("evaluation", "int8.json")), int8.about(data)
        content: dict[str, Any] = {
            "rows": evaluated["rows"],
            "calibration_rows": made.rows,
            "weight_bits": made.weight_bits,
            "sha256": inputs["int8"],
            **{key: times[key] for key in ("runtime", "threads", "runs")},
        }
        for name, accuracy in evaluated["models"].items():
            latency = {size: by_name[name]["median_ms"] for size, by_name in times["batch"].items() if name in by_name}
            figures = {key: accuracy[key] for key in ("top1", "agreement")}
            content[name] = {"bytes": sizes[name], **figures, "latency_ms": latency}
        artifacts.write_json(run.path("compression.json"), content)

    run.stage("compression", inputs, run.path("compression.json"), work)


def _networks(run: Run) -> dict[str, Any]:
    return {
        "dense": run.first.weights_sha256("dense"),
        "cut": run.weights_sha256(run.result),
        "plan": run.plan("ours").sha256(),
    }


def int8_sha256(run: Run) -> str:
    return hashlib.sha256(artifacts.read_bytes(run.path("model", FILE))).hexdigest()


# --- in a worker --------------------------------------------------------------------------------------------------------

Reading = tuple[Source, Units, Decoder, int, str]


def _write(model: nn.Module, reading: Reading, path: str) -> int8.Quantised:
    size = reading[2].size
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "model.onnx")
        onnx.to_onnx(model, torch.zeros(1, 3, size, size), file)
        return int8.to_int8(file, _images(*reading), path)


def _images(source: Source, units: Units, decoder: Decoder, num_classes: int, on_bad_row: str) -> Iterator[Tensor]:
    for unit in units:
        for batch in unit_batches(
            source, unit, decoder, micro_batch=ROWS_AT_ONCE, num_classes=num_classes, on_bad_row=on_bad_row
        ):
            yield batch.images_NCHW


def _measure(
    models: dict[str, nn.Module], int8_data: bytes, size: int, batches: tuple[int, int], runs: int
) -> tuple[dict[str, int], dict[str, Any]]:
    """Bytes of the ONNX files by name, and what `onnx_latency` finds."""
    with tempfile.TemporaryDirectory() as directory:
        files = {name: Path(directory, f"{name}.onnx") for name in (*models, "cut_int8")}
        for name, model in models.items():
            onnx.to_onnx(model, torch.zeros(1, 3, size, size), files[name])
        files["cut_int8"].write_bytes(int8_data)
        times = onnx.onnx_latency(files, (3, size, size), batch_sizes=batches, runs=runs)
        return {name: file.stat().st_size for name, file in files.items()}, times
