"""The plots of a report: kept channels, accuracy against cost, training, time, classes. SVG, or None without data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipeline.report import svg
from pipeline.report.numbers import ClassAccuracy, Layer, Network, PlannedWidth, StageTime
from pipeline.report.svg import Frame, Label
from pipeline.report.text import duration, percent, points, shorten

COLUMN_GROUPS = 40
"""More groups than this are set in two columns."""
CLASS_ROWS = 40
"""More classes than this become a cloud of points instead of named rows."""


# --- one row for each group or layer ----------------------------------------------------------------------------------


def kept_channels(groups: Sequence[PlannedWidth]) -> list[Markup]:
    """One row for each group in the network's order: outline = dense width, fill = what is kept; one or two columns."""
    rows = []
    for group in groups:
        kept = group["kept"] / group["size"] if group["size"] else 0.0
        title = f"{group['name']}: {group['kept']} of {group['size']} channels, {percent(kept, 1)}"
        rows.append(_Row(group["name"], [(kept, "kept")], str(group["kept"]), f"/{group['size']}", title))
    mean = sum(g["kept"] for g in groups) / max(1, sum(g["size"] for g in groups))
    return _columns(rows, mean, "kept channels of each group")


def layer_zeros(layers: Sequence[Layer], mean: float) -> list[Markup]:
    """One row for each weight in the network's order: fill = zeros, pale = nearly zero; dotted: `mean`, over all of them."""
    rows = []
    for layer in layers:
        zeros, near = layer["zeros"] or 0.0, layer["near_zeros"] or 0.0
        title = f"{layer['name']}: {percent(zeros, 1)} zero, {percent(near, 1)} zero or nearly so"
        rows.append(_Row(layer["name"], [(near, "near"), (zeros, "kept")], f"{100 * zeros:.1f}", " %", title))
    return _columns(rows, mean, "zeros of each weight")


@dataclass(frozen=True)
class _Row:
    """A bar of shares, the widest first, with figures at its end."""

    name: str
    shares: Sequence[tuple[float, str]]
    figure: str
    unit: str
    title: str


def _columns(rows: Sequence[_Row], mean: float, label: str) -> list[Markup]:
    if not rows:
        return []
    wide = len(rows) <= COLUMN_GROUPS
    half = len(rows) if wide else (len(rows) + 1) // 2
    name_chars = min(34, max(len(row.name) for row in rows))
    figure_chars = max(len(row.figure + row.unit) for row in rows)
    parts = [rows[i : i + half] for i in range(0, len(rows), half)]
    return [_column(part, 760 if wide else 520, name_chars, figure_chars, mean, label) for part in parts]


def _column(rows: Sequence[_Row], total: float, name_chars: int, figure_chars: int, mean: float, label: str) -> Markup:
    size, top = 15.0, 22.0
    left = name_chars * svg.MONO + 10
    width = total - left - figure_chars * svg.MONO - 14
    height, marks = top, []
    block = _block(rows[0].name)
    for row in rows:
        if _block(row.name) != block:  # a little air where the network's next block begins
            block, height = _block(row.name), height + 7
        body = (
            svg.text(left - 10, height + 11, shorten(row.name, name_chars), "mono", "end")
            + "".join(svg.rect(left, height + 3, width * share, size - 6, kind) for share, kind in row.shares)
            + svg.rect(left, height + 3, width, size - 6, "outline")
            + f'<text x="{total:.1f}" y="{height + 11:.1f}" class="mono" text-anchor="end">{row.figure}'
            f'<tspan class="soft">{row.unit}</tspan></text>'
        )
        marks.append(svg.titled(row.title, body))
        height += size
    scale = []
    for share in (0.0, 0.5, 1.0):
        scale.append(svg.text(left + width * share, 11, percent(share, 0), "soft", "middle"))
        if 0 < share < 1:
            scale.append(svg.line(left + width * share, top - 4, left + width * share, height, "grid"))
    at = left + width * mean
    reference = svg.line(at, top - 4, at, height + 2, "mean")
    if abs(mean - 0.5) > 0.09 and 0.09 < mean < 0.9:
        scale.append(svg.text(at, 11, f"mean {percent(mean, 0)}", "mean-text", "middle"))
    return svg.drawing(total, height + 4, [*scale, *marks, reference], label)


def _block(name: str) -> str:
    """`layer3` of `layer3.12.conv1`; `blocks.3` of `blocks.3.mlp.fc1`, where all would be `blocks`."""
    head, *rest = name.split(".")
    return f"{head}.{rest[0]}" if head in {"blocks", "layers", "stages", "encoder"} and rest else head


# --- accuracy against cost ------------------------------------------------------------------------------------------


def accuracy_against(networks: Sequence[Network], costs: Sequence[float | None], x_title: str) -> Markup | None:
    """Top-1 against a cost of each network (same order). An arrow goes from before recovery to after it."""
    shown = [(n, cost) for n, cost in zip(networks, costs, strict=True) if cost is not None and n.top1 is not None]
    if not shown:
        return None
    values = [100 * v for n in networks for v in (n.before, n.after) if v is not None]
    # The y range is that of all networks, so that plots of two costs can be read across.
    x_high = 1.06 * max(cost for _, cost in shown)
    frame = Frame(
        (0.0, x_high or 1.0),
        svg.padded(values, floor=0.0, ceiling=101.0),
        x_title,
        "top-1, %",
        size=(340, 270),
        right=104,
    )
    labels, marks = [], []
    for network, cost in shown:
        x = frame.x(cost)
        name = network.name.split(" (")[0]
        after = None if network.after is None else frame.y(100 * network.after)
        before = None if network.before is None else frame.y(100 * network.before)
        if before is not None:
            marks.append(svg.circle(x, before, 4.5, f"{network.kind} hollow" if after is not None else network.kind))
            hint = f"{name} before" if after is not None else name
            css = "soft" if after is not None else network.kind
            labels.append(Label(x, before, f"{hint} {percent(network.before)}", css))
        if after is not None:
            if before is not None:
                marks.append(svg.arrow(x, before, after, network.kind))
            marks.append(svg.circle(x, after, 4.5, network.kind))
            labels.append(Label(x, after, f"{name} {percent(network.after)}", network.kind))
    frame.body += [*svg.settle(labels, frame), *marks]
    return frame.drawing(f"top-1 against {x_title}")


# --- training -------------------------------------------------------------------------------------------------------


def curve(
    history: Sequence[Mapping[str, Any]], key: str, title: str, *, scale: float = 1.0, x: str = "step"
) -> Markup | None:
    """A figure of the history against the step, with its last value named. Records without it leave a gap."""
    placed = [record for record in history if record.get(x) is not None and key in record]
    known = [(float(record[x]), scale * record[key]) for record in placed if record[key] is not None]
    if not known:
        return None
    steps, values = [step for step, _ in known], [y for _, y in known]
    last = max(float(record[x]) for record in history if record.get(x) is not None)
    frame = Frame((0.0, last or 1.0), svg.padded(values, floor=0.0), x, title, right=58)
    pieces: list[list[tuple[float, float]]] = [[]]
    for record in placed:  # where it was not measured the curve goes on
        if record[key] is None:
            pieces.append([])  # not finite: the curve breaks
        else:
            pieces[-1].append((float(record[x]), scale * record[key]))
    for piece in pieces:
        way = "L".join(f"{frame.x(step):.1f} {frame.y(y):.1f}" for step, y in _thinned(piece))
        frame.body.append(f'<path d="M{way}" class="curve"/>' if way else "")
    at, y = frame.x(steps[-1]), frame.y(values[-1])
    frame.body += [svg.circle(at, y, 3.5, "ours"), svg.text(at + 9, y + 4, f"{values[-1]:.4g}", "ours")]
    return frame.drawing(f"{title} against {x}")


def _thinned(points: Sequence[tuple[float, float]], most: int = 600) -> Sequence[tuple[float, float]]:
    """Lowest and highest value of each stretch, so that a long curve keeps its spikes."""
    if len(points) <= most:
        return points
    size = -(-len(points) // (most // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return [*kept, points[-1]]


# --- time -----------------------------------------------------------------------------------------------------------


def stage_times(stages: Sequence[StageTime]) -> Markup | None:
    if not stages:
        return None
    row, total = 24.0, 490.0
    left = max(len(stage["name"] or "") for stage in stages) * svg.GLYPH + 20
    width = total - left - 120
    known = [stage["seconds"] for stage in stages if stage["seconds"] is not None]
    longest, whole, body = max(known, default=0.0) or 1.0, sum(known) or 1.0, []
    in_order = sorted(
        stages, key=lambda stage: stage["started"] or math.inf
    )  # a manifest read back is in the order of names
    for i, stage in enumerate(in_order):
        y, seconds = i * row, stage["seconds"]
        body.append(svg.text(left - 10, y + 15, stage["name"], "", "end"))
        if seconds is None:
            body.append(svg.text(left, y + 15, stage["state"] or "not run", "soft"))
            continue
        length = max(1.5, width * seconds / longest)
        body.append(svg.rect(left, y + 5, length, row - 11, "kept"))
        part = f" · {percent(seconds / whole, 0)}" if seconds / whole >= 0.005 else ""
        again = f" · start {stage['attempts']}" if (stage["attempts"] or 1) > 1 else ""
        body.append(svg.text(left + length + 8, y + 15, f"{duration(seconds)}{part}{again}", "soft"))
    return svg.drawing(total, len(stages) * row, body, "time of each stage")


# --- classes --------------------------------------------------------------------------------------------------------


def measured_classes(classes: Sequence[ClassAccuracy]) -> list[tuple[str, float, float]]:
    """(name, dense, pruned) of the classes of which both are known."""
    found = []
    for one in classes:
        dense, pruned = one["dense"], one["pruned"]
        if dense is not None and pruned is not None:
            found.append((str(one["class"]), dense, pruned))
    return found


def class_accuracy(classes: Sequence[ClassAccuracy]) -> Markup | None:
    """Named rows for few classes, a cloud of dense against pruned for many."""
    measured = measured_classes(classes)
    if not measured:
        return None
    return _class_rows(measured) if len(measured) <= CLASS_ROWS else _class_cloud(measured)


def _class_rows(classes: Sequence[tuple[str, float, float]]) -> Markup:
    row, top, total = 20.0, 24.0, 760.0
    chars = min(30, max(len(name) for name, *_ in classes))
    left, right = max(60.0, chars * svg.GLYPH + 16), 66.0
    width = total - left - right
    low = 100 * min(min(dense, pruned) for _, dense, pruned in classes)
    low = 0.0 if low < 40 else 10 * ((low - 2) // 10)
    height = top + row * len(classes)

    def at(fraction: float) -> float:
        return left + width * (100 * fraction - low) / (100 - low)

    body = []
    for tick in svg.ticks(low, 100):
        body += [svg.line(at(tick / 100), top - 6, at(tick / 100), height, "grid")]
        body += [svg.text(at(tick / 100), 11, f"{tick:g} %", "soft", "middle")]
    for i, (name, dense, pruned) in enumerate(classes):
        y = top + i * row + row / 2
        marks = (
            svg.text(left - 12, y + 4, shorten(name, chars), "", "end")
            + svg.line(at(dense), y, at(pruned), y, "span")
            + svg.circle(at(dense), y, 4.5, "dense hollow")
            + svg.circle(at(pruned), y, 4, "ours")
            + svg.text(total, y + 4, points(pruned, dense), "soft", "end")
        )
        body.append(svg.titled(f"{name}: dense {percent(dense)}, pruned {percent(pruned)}", marks))
    return svg.drawing(total, height + 4, body, "top-1 of each class, dense and pruned")


def _class_cloud(classes: Sequence[tuple[str, float, float]]) -> Markup:
    values = [100 * value for _, *pair in classes for value in pair]
    span = svg.padded(values, floor=0.0, ceiling=101.0)
    frame = Frame(span, span, "dense, top-1 of a class, %", "pruned, top-1 of a class, %", size=(340, 340))
    low, high = span[0], min(100.0, span[1])
    frame.body.append(svg.line(frame.x(low), frame.y(low), frame.x(high), frame.y(high), "diagonal"))
    for (dense, pruned), same in itertools.groupby(sorted(classes, key=lambda c: c[1:]), key=lambda c: c[1:]):
        names = [name for name, *_ in same]
        shown = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
        title = f"{shown}: dense {percent(dense)}, pruned {percent(pruned)}"
        x, y = frame.x(100 * dense), frame.y(100 * pruned)
        frame.body.append(svg.titled(title, svg.circle(x, y, min(6.0, 1.6 + 0.6 * len(names) ** 0.5), "ours cloud")))
    return frame.drawing("top-1 of each class: pruned against dense")
