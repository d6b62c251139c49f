"""Several rounds in the report: a row for each, shares of the dense network, and a word on the controls."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from pipeline.report.html import findings, render, rounds
from pipeline.report.numbers import complete
from pipeline.report.terminal import print_summary
from tests.report.samples import digits


def in_rounds() -> dict[str, Any]:
    """The second has not come to its recovery."""
    first = {"params": 3484400, "macs": 15830450, "top1_before_recovery": 0.95, "top1": 0.97, "seconds": 75.0}
    second = {"params": 2167446, "macs": 11162624, "top1_before_recovery": 0.8917, "seconds": None}
    return {**digits(), "rounds": [{"round": 1, **first}, {"round": 2, **second}]}


def shown(cells: list[Any]) -> list[str]:
    return [f"{cell.value} {cell.note}".strip() for cell in cells]


def test_a_round_is_a_row_beside_the_dense_network():
    (one, first), (two, second) = rounds(complete(in_rounds()))
    assert (one, shown(first)) == (
        "1",
        ["3.484 M 70.7 %", "15.83 M 70.7 %", "95.00 % −1.67", "97.00 % +0.33", "1 min 15 s"],
    )
    assert (two, shown(second)[2:]) == ("2", ["89.17 % −7.50", "–", "–"])


def test_one_round_is_null_and_not_shown():
    summary = complete(digits())
    assert summary["rounds"] is None
    assert rounds(summary) == []
    assert "Round by round" not in render(summary)
    assert not any("rounds" in sentence for sentence in findings(summary))


def test_page_and_terminal_show_the_rounds():
    page, console = render(in_rounds()), Console(file=io.StringIO(), width=200)
    print_summary(in_rounds(), console)
    assert "Round by round" in page
    assert "It cuts in 2 rounds, with a recovery after each" in page
    lines = [line for line in console.file.getvalue().splitlines() if line.startswith((" 1 ", " 2 "))]
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert max(len(line.rstrip()) for line in lines) <= 80
