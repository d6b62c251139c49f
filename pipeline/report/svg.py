"""Drawings as SVG text: marks, a frame with axes, labels that keep clear of each other. Colours: the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

GLYPH = 6.6  # width of a glyph at the 11 px of a label, for wide fonts and bold ones too
MONO = 6.35  # width of every glyph in the 10.5 px monospace of group names


def drawing(width: float, height: float, body: Sequence[str], label: str) -> Markup:
    """`label` is what a screen reader says."""
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}" '
        f'style="max-width:{width:g}px">{"".join(body)}</svg>'
    )


def text(x: float, y: float, content: object, kind: str = "", anchor: str = "start") -> str:
    css = f' class="{kind}"' if kind else ""
    end = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{css}{end}>{escape(content)}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}" class="{kind}"/>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def circle(x: float, y: float, radius: float, kind: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{kind}"/>'


def arrow(x: float, y_from: float, y_to: float, kind: str) -> str:
    """Vertical, from one mark to another, with room left for both."""
    up = -1 if y_to < y_from else 1
    tip, start = y_to - 7 * up, y_from + 6 * up
    if (tip - start) * up < 6:
        return ""
    barb = tip - 6 * up
    path = f"M{x - 3.5:.1f} {barb:.1f}L{x:.1f} {tip:.1f}L{x + 3.5:.1f} {barb:.1f}"
    return line(x, start, x, tip, f"arrow {kind}") + f'<path d="{path}" class="head {kind}"/>'


def titled(title: object, body: str) -> str:
    """Marks with what a pointer over them tells."""
    return f"<g><title>{escape(title)}</title>{body}</g>"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values inside [low, high], about as many as wanted."""
    raw = max(high - low, 1e-12) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_text(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}"


class Frame:
    """A plot's area: data to pixels, with grid, ticks and the titles of both axes."""

    def __init__(
        self,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        x_title: str,
        y_title: str,
        *,
        size: tuple[float, float] = (430, 230),
        right: float = 16,
    ) -> None:
        self.left, self.top, self.right = 46.0, 26.0, right
        self.width, self.height = size
        self.x_range, self.y_range = x_range, y_range
        self.body: list[str] = [text(0, 11, y_title, "axis")]
        for tick in ticks(*y_range):
            y = self.y(tick)
            self.body += [
                line(self.left, y, self.left + self.width, y, "grid"),
                text(self.left - 8, y + 4, tick_text(tick), "soft", "end"),
            ]
        base = self.top + self.height
        self.body.append(line(self.left, base, self.left + self.width, base, "base"))
        for tick in ticks(*x_range):
            x = self.x(tick)
            self.body += [line(x, base, x, base + 4, "base"), text(x, base + 17, tick_text(tick), "soft", "middle")]
        self.body.append(text(self.left + self.width, base + 34, x_title, "axis", "end"))

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + self.width * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.top + self.height * (high - value) / (high - low)

    def drawing(self, label: str) -> Markup:
        return drawing(self.left + self.width + self.right, self.top + self.height + 42, self.body, label)


def padded(values: Sequence[float], *, floor: float | None = None, ceiling: float | None = None) -> tuple[float, float]:
    """A range around the values with some air, inside what is possible."""
    low, high = min(values), max(values)
    air = 0.08 * (high - low) or abs(high) * 0.05 or 1.0
    low, high = low - air, high + air
    return (low if floor is None else max(floor, low)), (high if ceiling is None else min(ceiling, high))


@dataclass
class Label:
    """Text beside a mark at (x, y); `settle` moves it up or down until it is free."""

    x: float
    y: float
    content: str
    kind: str = ""
    at: float = 0.0
    left: bool = False

    @property
    def span(self) -> tuple[float, float]:
        width = GLYPH * len(self.content) + 10
        return (self.x - width - 10, self.x) if self.left else (self.x, self.x + width + 10)


def settle(labels: Sequence[Label], frame: Frame, gap: float = 14.0) -> list[str]:
    """Labels as text: left of the mark where the frame ends or another mark stands; spread out where crowded."""
    edge = frame.left + frame.width + frame.right
    for label in labels:
        label.at = label.y
        first, last = label.span
        on_a_mark = any(first + 8 < other.x < last + 6 and abs(other.y - label.y) < 10 for other in labels)
        label.left = last > edge or on_a_mark
    ordered = sorted(labels, key=lambda one: one.y)
    for _ in range(200):
        moved = False
        for i, upper in enumerate(ordered):
            for lower in ordered[i + 1 :]:
                apart = upper.span[1] <= lower.span[0] or lower.span[1] <= upper.span[0]
                missing = gap - (lower.at - upper.at)
                if not apart and missing > 0.05:
                    upper.at, lower.at, moved = upper.at - missing / 2, lower.at + missing / 2, True
        for label in ordered:
            label.at = min(max(label.at, frame.top + 4), frame.top + frame.height - 6)
        if not moved:
            break
    parts = []
    for label in labels:
        side = -1 if label.left else 1
        if abs(label.at - label.y) > 5:
            parts.append(line(label.x + 6 * side, label.y, label.x + 11 * side, label.at, "leader"))
        parts.append(
            text(label.x + 13 * side, label.at + 4, label.content, label.kind, "end" if label.left else "start")
        )
    return parts
