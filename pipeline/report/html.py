"""report.html: one self-contained page, from summary.json alone. Plots are SVG made here; nothing is loaded from elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from pipeline.report.terminal import count, duration, milliseconds, percent, rows_of


def render(summary: Mapping[str, Any]) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=percent, count=count, ms=milliseconds, duration=duration, ratio=ratio)
    template = environment.from_string(files("pipeline.report").joinpath("report.html.j2").read_text())
    recover, train = summary["recover"], summary["train"]
    return template.render(
        s=summary,
        rows=rows_of(summary),
        batches=list(summary["dense"]["latency_ms"]),
        kept=Markup(kept_bars(summary["plan"]["groups"])),
        accuracy=Markup(accuracy_plot(rows_of(summary))),
        recovery=Markup(loss_plot(recover["history"])) if recover else None,
        training=Markup(loss_plot(train["history"])) if train else None,
        stages=Markup(stage_bars(summary["stages"])),
        written=time.strftime("%Y-%m-%d %H:%M", time.localtime()),
    )


def ratio(value: float | None, of: float | None) -> str:
    return f"{value / of:.2f}×" if value is not None and of else ""


# --- plots: strings of SVG, colours from the page's variables -----------------------------------------------------------


def _svg(width: float, height: float, body: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}" '
        f'style="max-width:{width:g}px">{"".join(body)}</svg>'
    )


def _text(x: float, y: float, text: object, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def kept_bars(groups: Sequence[Mapping[str, Any]]) -> str:
    """One row for each group in the network's order: the outline is the dense width, the fill what is kept."""
    row, left, width = 15, 210, 520
    widest = max((g["size"] for g in groups), default=1)
    body = []
    for i, group in enumerate(groups):
        y = i * row
        full, kept = width * math.sqrt(group["size"] / widest), width * math.sqrt(group["size"] / widest) * group["kept"] / group["size"]
        body.append(
            f'<g><title>{escape(group["name"])}: {group["kept"]} of {group["size"]} channels</title>'
            f'{_text(left - 8, y + 11, group["name"], "name", "end")}'
            f'<rect x="{left}" y="{y + 2}" width="{full:.1f}" height="{row - 4}" class="outline"/>'
            f'<rect x="{left}" y="{y + 2}" width="{kept:.1f}" height="{row - 4}" class="fill"/>'
            f'{_text(left + full + 6, y + 11, str(group["kept"]) + "/" + str(group["size"]), "value")}</g>'
        )
    return _svg(left + width + 80, max(1, len(groups)) * row, body, "kept channels of each group")


def _axis(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round tick values inside [low, high]."""
    raw = max(high - low, 1e-12) / wanted
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * f for f in (1, 2, 5, 10) if power * f >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


class _Frame:
    """Axes of a plot: data to pixels, grid and ticks."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], x_title: str, y_title: str) -> None:
        self.left, self.top, self.width, self.height = 52, 12, 420, 220
        self.x0, self.x1 = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
        margin = 0.08 * (max(ys) - min(ys)) or 0.01
        self.y0, self.y1 = min(ys) - margin, max(ys) + margin
        self.body: list[str] = []
        for tick in _axis(self.y0, self.y1):
            y = self.y(tick)
            self.body.append(f'<line x1="{self.left}" x2="{self.left + self.width}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            self.body.append(_text(self.left - 6, y + 4, f"{tick:g}", "value", "end"))
        for tick in _axis(self.x0, self.x1):
            self.body.append(_text(self.x(tick), self.top + self.height + 16, f"{tick:g}", "value", "middle"))
        self.body.append(_text(self.left + self.width / 2, self.top + self.height + 34, x_title, "name", "middle"))
        self.body.append(_text(self.left, self.top - 1, y_title, "name"))

    def x(self, value: float) -> float:
        return self.left + self.width * (value - self.x0) / (self.x1 - self.x0)

    def y(self, value: float) -> float:
        return self.top + self.height * (1 - (value - self.y0) / (self.y1 - self.y0))

    def svg(self, label: str) -> str:
        return _svg(self.left + self.width + 70, self.top + self.height + 42, self.body, label)


def accuracy_plot(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Top-1 against MACs; an arrow goes from before recovery to after it."""
    points = [(name, row["macs"] / 1e6, 100 * row["before"], row["after"]) for name, row in rows if row["before"] is not None]
    ys = [y for *_, y, after in points] + [100 * after for *_, after in points if after is not None]
    xs = [0.0] + [1.08 * x for _, x, *_ in points]
    frame = _Frame(xs, ys, "million MACs of one row", "top-1, %")
    for name, macs, before, after in points:
        kind = "ours" if name.startswith("ours") else "dense" if name == "dense" else "control"
        x, y = frame.x(macs), frame.y(before)
        frame.body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="{kind}{"" if after is None else " hollow"}"/>')
        frame.body.append(_text(x + 9, y + 4, name, "name"))
        if after is not None:
            top = frame.y(100 * after)
            frame.body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 6:.1f}" y2="{top + 6:.1f}" class="arrow {kind}"/>')
            frame.body.append(f'<circle cx="{x:.1f}" cy="{top:.1f}" r="5" class="{kind}"/>')
            frame.body.append(_text(x + 9, top + 4, f"{100 * after:.1f} after recovery", "name"))
    return frame.svg("top-1 against MACs")


def loss_plot(history: Sequence[Mapping[str, Any]]) -> str:
    xs, ys = [float(h["step"]) for h in history], [float(h["loss"]) for h in history]
    frame = _Frame(xs, ys, "step", "training loss")
    path = " ".join(f"{'L' if i else 'M'}{frame.x(x):.1f} {frame.y(y):.1f}" for i, (x, y) in enumerate(zip(xs, ys, strict=True)))
    frame.body.append(f'<path d="{path}" class="curve"/>')
    if len(xs) < 40:
        frame.body += [f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.5" class="ours"/>' for x, y in zip(xs, ys, strict=True)]
    return frame.svg("training loss")


def stage_bars(stages: Sequence[Mapping[str, Any]]) -> str:
    row, left, width = 22, 130, 280
    longest = max((s["seconds"] or 0 for s in stages), default=0) or 1
    body = []
    for i, stage in enumerate(stages):
        y, length = i * row, width * (stage["seconds"] or 0) / longest
        body.append(_text(left - 8, y + 15, stage["name"], "name", "end"))
        body.append(f'<rect x="{left}" y="{y + 4}" width="{max(1, length):.1f}" height="{row - 8}" class="fill"/>')
        body.append(_text(left + length + 6, y + 15, duration(stage["seconds"]), "value"))
    return _svg(left + width + 100, max(1, len(stages)) * row, body, "time of each stage")
