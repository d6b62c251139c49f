"""Prometheus figures of the workers and the driver, through Ray's metrics agents. Each is made on first use in its process.

The agents add a prefix to all of them, and a suffix to those that only grow: `exported` tells the name that Prometheus sees.
"""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge

COUNTED = {
    "pruning_rows": "rows that workers have taken into their sums",
    "pruning_skipped_rows": "rows that workers could not read and have left out of their sums",
    "pruning_units": "units that workers have committed",
    "pruning_commits": "commits that workers have written",
    "pruning_lost_leases": "leases whose worker died or failed: their units are done again",
}
"""Sums since the start of the process; the rate of a sum over all processes is the run's."""
MEASURED = {
    "pruning_training_loss": "mean training loss since the last record",
    "pruning_training_rows_per_second": "rows per second of training since the last record",
    "pruning_training_zero_fraction": "part of the weights that are zero or masked, in training with penalties, gates or masks",
}
"""The last value; of a training there is one process that tells."""
DESCRIPTIONS = {**COUNTED, **MEASURED}

_made: dict[str, Any] = {}


def exported(name: str) -> str:
    """As Ray's agents give it to Prometheus."""
    return f"ray_{name}_total" if name in COUNTED else f"ray_{name}"


def count(name: str, value: int) -> None:
    assert name in COUNTED
    if value:  # Ray refuses to add nothing
        _metric(name, Counter).inc(value)


def gauge(name: str, value: float) -> None:
    assert name in MEASURED
    _metric(name, Gauge).set(value)


def _metric(name: str, kind: Any) -> Any:
    if name not in _made:
        _made[name] = kind(name, description=DESCRIPTIONS[name])
    return _made[name]
