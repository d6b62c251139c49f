"""Figures as people read them: percent, counts, times. What was not measured is a dash."""

from __future__ import annotations

MISSING = "–"
NOT_MEASURED = "not measured"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def percent(fraction: float | None, digits: int = 2) -> str:
    return MISSING if fraction is None else f"{100 * fraction:.{digits}f} %"


def points(fraction: float | None, of: float | None) -> str:
    """Difference of two accuracies in percentage points, with its sign."""
    if fraction is None or of is None:
        return ""
    difference = round(100 * (fraction - of), 2)
    return f"{'−' if difference < 0 else '+' if difference > 0 else '±'}{abs(difference):.2f}"


def share(value: float | None, of: float | None) -> str:
    """Of the dense network: 0.5 as 50.0 %."""
    return f"{100 * value / of:.1f} %" if value is not None and of else ""


def speedup(value: float | None, dense: float | None) -> str:
    return f"{dense / value:.2f}×" if value and dense is not None else ""


def count(value: float | None) -> str:
    """Four digits: 60,192,808 as 60.19 M."""
    if value is None:
        return MISSING
    value = float(f"{value:.4g}") if value >= 1000 else value
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{_digits(value / size, 4)} {unit}"
    return f"{value:.0f}"


def num_bytes(value: float | None) -> str:
    """13,668,429 as 13.67 MB."""
    return MISSING if value is None else f"{count(value)}B" if value >= 1000 else f"{value:.0f} B"


def whole(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}"


def milliseconds(value: float | None) -> str:
    return MISSING if value is None else f"{_digits(value, 3)} ms"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def hours(value: float | None) -> str:
    """0.47, 12.3: two digits at least, however few they are."""
    return MISSING if value is None else _digits(value, 3) if value >= 0.1 or not value else f"{value:.2g}"


def rate(per_s: float | None, unit: str = "rows") -> str:
    return MISSING if per_s is None else f"{_digits(per_s, 3)} {unit}/s"


def small(value: float | None) -> str:
    """A rounding error: 1.2·10⁻⁶; exactly 0 is worth telling."""
    if not value:
        return MISSING if value is None else "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}·10{str(int(exponent)).translate(_RAISED)}"


def unbroken(sentence: str) -> str:
    """No line break before a percent sign, within top-1, or between a figure and its unit."""
    for breaking, kept in ((" %", "\u00a0%"), ("top-", "top\u2011"), (" ms", "\u00a0ms"), (" points", "\u00a0points")):
        sentence = sentence.replace(breaking, kept)
    return sentence


def shorten(text: str, length: int) -> str:
    """Cut in the middle, where qualified names tell least."""
    if len(text) <= length:
        return text
    tail = (length - 1) * 2 // 3
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"


def _digits(value: float, digits: int) -> str:
    """So many significant digits, but no rounding left of the point: 2.23, 38.1, 1,204."""
    size = len(str(int(abs(float(f"{value:.{digits}g}")))))
    return f"{value:,.{max(0, digits - size)}f}"
