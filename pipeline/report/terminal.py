"""Tables for the terminal: the end of a run, its stages, a network's channel groups."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

MISSING = "–"


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.2f} %"


def count(value: float | None) -> str:
    """12,345,678 as 12.35 M."""
    if value is None:
        return MISSING
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def milliseconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f} ms"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def rows_of(summary: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """dense | magnitude | random | ours, with the same keys; what was not measured is None."""
    dense, ours = summary["dense"], summary["pruned"]
    rows = [("dense", {"before": dense["top1"], "after": None, **dense})]
    for name, control in sorted(summary["controls"].items()):
        rows.append((name, {"before": control["top1_before_recovery"], "after": control["top1"], **control}))
    label = f"ours ({summary['saliency']['criterion']})"
    rows.append((label, {"before": ours["top1_before_recovery"], "after": ours["top1"], **ours}))
    return rows


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    table = Table(title=f"{summary['model']}: {summary['plan']['budget_text']}")
    for name in ("network", "top-1", "after recovery", "params", "MACs"):
        table.add_column(name, justify="left" if name == "network" else "right")
    batches = list(summary["dense"]["latency_ms"])
    for batch in batches:
        table.add_column(f"latency, batch {batch}", justify="right")
    for name, row in rows_of(summary):
        latencies = [milliseconds(row["latency_ms"].get(batch)) for batch in batches]
        style = "bold" if name.startswith("ours") else ""
        table.add_row(name, percent(row["before"]), percent(row["after"]), count(row["params"]), count(row["macs"]), *latencies, style=style)
    console.print(table)


def print_status(stages: Mapping[str, Any], console: Console) -> None:
    """`stages`: records with state, started, finished, artifact."""
    table = Table(title="stages")
    for name in ("stage", "state", "started", "time", "artifact"):
        table.add_column(name)
    for name, record in stages.items():
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.started))
        took = record.finished - record.started if record.state == "done" else None
        table.add_row(name, record.state, started, duration(took), record.artifact)
    console.print(table)


def print_graph(name: str, graph: Any, costs: Any, console: Console) -> None:
    table = Table(title=f"{name}: {len(graph.groups)} groups, {count(costs.params)} params, {count(costs.macs)} MACs")
    for column in ("group", "channels", "tensors", "read by"):
        table.add_column(column)
    for group in graph.groups:
        readers = ", ".join(site.module for site in group.consumers)
        table.add_row(group.name, str(group.size), str(len({m.tensor for m in group.members})), readers)
    console.print(table)
    frozen = Table(title="stays whole")
    for column in ("group", "channels", "operation", "where", "why"):
        frozen.add_column(column)
    for one in graph.frozen:
        frozen.add_row(one.group, str(one.size), one.operation, one.where, one.reason)
    console.print(frozen)
