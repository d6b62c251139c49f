"""What the report and the terminal say about residual blocks."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from pipeline.models.costs import count
from pipeline.models.graph import Block
from pipeline.report import terminal
from pipeline.report.html import findings, render
from pipeline.report.numbers import complete
from tests.graphs import chain
from tests.report.samples import digits


@pytest.mark.parametrize(
    ("removed", "sentence"),
    [
        (["layer1.1", "layer3.1"], "Of 5 residual blocks that can go, 2 are removed: layer1.1, layer3.1."),
        ([], "Of 5 residual blocks that can go, 0 are removed."),
    ],
)
def test_the_removed_blocks_are_named(removed, sentence):
    summary = digits()
    summary["plan"] |= {"removed_blocks": removed, "num_blocks": 5}
    summary["plan"]["groups"][0]["kept"] = 0  # it lies inside of a removed block
    assert sentence in findings(complete(summary))
    assert sentence in render(summary)


def test_a_run_that_looks_for_no_blocks_says_nothing_of_them():
    assert not any("residual block" in sentence for sentence in findings(complete(digits())))


def test_the_terminal_lists_blocks_that_can_go():
    graph = replace(chain(3, 4, 2), blocks=(Block("layer1.1", (), ()), Block("layer2.1", (), ())))
    console = Console(file=io.StringIO(), width=120)
    terminal.print_graph("net", graph, count(chain(3, 4, 2), {}), console)
    assert "residual blocks that can go: layer1.1, layer2.1" in console.file.getvalue()
