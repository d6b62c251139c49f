"""Tables for the terminal: the end of a run, its stages, a network's channel groups."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.report.html import (
    AFTER,
    BEFORE,
    NONZERO,
    ROUNDS,
    Cell,
    comparison,
    compression,
    findings,
    quantised,
    rounds,
)
from pipeline.report.numbers import COMPRESSED, complete, networks
from pipeline.report.status import Status, sentences
from pipeline.report.text import NOT_MEASURED, count, duration

SHORT = {BEFORE: "top-1, cut", AFTER: "top-1, recovered", NONZERO: "non-zero"}

# Names come from users' networks and paths: they enter tables as Text, since rich reads brackets in a str as markup.


def summary_table(summary: Mapping[str, Any]) -> Table:
    """dense | random | magnitude | ours, one row a figure: it fits 80 columns, and latency stands below the MACs."""
    full = complete(summary)
    columns = networks(full)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(full["model"] or "network"), title_justify="left")
    table.add_column("")
    for network in columns:
        style = {"ours": "bold cyan", "control": "yellow"}.get(network.kind, "")
        table.add_column(
            Text(network.name), justify="right", style="bold" if network.kind == "ours" else "", header_style=style
        )
    for name, cells in comparison(full):
        shown = [_shown(cell) for cell in cells]
        missing = [Text()] * (len(columns) - len(shown))  # the dense network's cell spans two rows of the page
        table.add_row(Text(SHORT.get(name, name)), *missing, *shown, end_section=name == "loss")
    return table


def _table(title: str, columns: Iterable[str], rows: Iterable[tuple[str, Iterable[Cell]]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for name, cells in rows:
        table.add_row(name, *(_shown(cell) for cell in cells))
    return table


def _shown(cell: Cell) -> Text:
    return Text.assemble(cell.value, (f" {cell.note}" if cell.note else "", "dim"))


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    full = complete(summary)
    console.print(summary_table(full))
    if rounds(full):
        console.print(_table("round by round", (SHORT.get(name, name) for name in ROUNDS), rounds(full)))
    if compression(full):
        console.print(_table("with INT8", COMPRESSED.values(), compression(full)))
    for sentence in [*findings(full), *([quantised(full)] if compression(full) else [])]:
        console.print(Text(sentence), style="dim")


STATE_STYLES = {"done": "green", "running": "yellow", "silent": "bold red", "to come": "dim"}


def status_table(status: Status) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("stage", "state", "begun", "time", "left"):
        table.add_column(name, justify="right" if name in ("time", "left") else "left", no_wrap=True)
    for stage in status.stages:
        begun = time.strftime("%m-%d %H:%M", time.localtime(stage.started)) if stage.started else ""
        starts = f", start {stage.attempts}" if stage.attempts > 1 else ""
        table.add_row(
            Text(stage.stage),
            Text(f"{stage.state}{starts}", style=STATE_STYLES[stage.state]),
            begun,
            "" if stage.seconds is None else duration(stage.seconds),
            "" if stage.seconds_left is None else duration(stage.seconds_left),
        )
    return table


def print_status(status: Status, console: Console) -> None:
    if status.stages:
        console.print(status_table(status))
    for sentence in sentences(status):
        console.print(Text(sentence))


def print_graph(name: str, graph: Any, costs: Any, console: Console) -> None:
    """Channel groups of a network and what stays whole. `costs` are counted: the title says that nothing was timed."""
    figures = f"{count(costs.params)} params, {count(costs.macs)} MACs (latency: {NOT_MEASURED})"
    table = Table(title=Text(f"{name}: {len(graph.groups)} groups, {figures}"), title_justify="left")
    for column in ("group", "channels", "tensors", "read by"):
        table.add_column(column, justify="right" if column in {"channels", "tensors"} else "left")
    for group in graph.groups:
        readers = ", ".join(site.module for site in group.consumers)
        table.add_row(Text(group.name), str(group.size), str(len({m.tensor for m in group.members})), Text(readers))
    console.print(table)
    frozen = Table(title="stays whole", title_justify="left")
    for column in ("group", "channels", "operation", "where", "why"):
        frozen.add_column(column, justify="right" if column == "channels" else "left")
    for one in graph.frozen:
        frozen.add_row(Text(one.group), str(one.size), Text(one.operation), Text(one.where), Text(one.reason))
    console.print(frozen)
    if graph.blocks:
        console.print(Text(f"residual blocks that can go: {', '.join(block.name for block in graph.blocks)}"))
