"""Prometheus figures of the workers, through Ray's metrics agent. Each is made on first use in its process."""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge

DESCRIPTIONS = {
    "pruning_rows": "rows that workers have taken into their sums",
    "pruning_units": "units that workers have committed",
    "pruning_commits": "commits that workers have written",
    "pruning_training_loss": "mean training loss since the last record",
    "pruning_training_rows_per_second": "rows per second of training since the last record",
    "pruning_training_zero_fraction": "part of the weights that are zero or masked, in training with penalties, gates or masks",
}

_made: dict[str, Any] = {}


def count(name: str, value: int) -> None:
    _metric(name, Counter).inc(value)


def gauge(name: str, value: float) -> None:
    _metric(name, Gauge).set(value)


def _metric(name: str, kind: Any) -> Any:
    if name not in _made:
        _made[name] = kind(name, description=DESCRIPTIONS[name])
    return _made[name]
