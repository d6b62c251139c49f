"""Training towards zeros in the report: null where there was none, a section with its curves and layers, a line in the terminal."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from pipeline.report import plots
from pipeline.report.html import findings, render, zeros
from pipeline.report.numbers import complete, from_json, to_json
from pipeline.report.terminal import print_summary
from tests.report.samples import digits
from tests.report.test_html import EVIL, Page

LAYERS = [
    {"name": "conv1.0.weight", "zeros": 0.5, "near_zeros": 0.625},
    {"name": "layer1.0.conv1.weight", "zeros": 0.75, "near_zeros": 0.75},
]


def trained(**figures: list[float]) -> dict[str, Any]:
    """`digits` after a training of four records."""
    columns = {"step": [1, 2, 3, 4], "loss": [2.0, 1.5, 1.25, 1.0], "zeros": [0.0, 0.25, 0.5, 0.75], **figures}
    history = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    training = {"method": "cubic", "epochs": 4, "seconds": 12.0, "rows_per_s": 300.0, "history": history}
    return {**digits(), "sparsify": {**training, "zeros": 0.7, "near_zeros": 0.72, "layers": LAYERS}}


def test_without_such_a_training_there_is_null_and_no_section():
    summary = complete(digits())
    assert (summary["sparsify"], summary["recover"]["zeros"], summary["recover"]["layers"]) == (None, None, [])
    assert zeros(summary) == []
    assert "zeros" not in Page(render(summary)).text
    assert not any("zero" in sentence for sentence in findings(summary))


def test_json_there_and_back_leaves_it_as_it_is():
    assert from_json(to_json(trained())) == complete(trained())


def test_the_section_has_curves_of_loss_and_zeros_and_a_bar_for_each_layer():
    (section,) = zeros(complete(trained()))
    assert (section.title, section.told) == ("Training towards zeros", "cubic, 4 epochs, 12.0 s, 300 rows/s")
    assert [re.search('aria-label="(.*?)"', plot)[1] for plot in section.curves] == [
        "training loss against step",
        "weights that are zero, % against step",
    ]
    (bars,) = section.layers
    assert "layer1.0.conv1.weight: 75.0 % zero, 75.0 % zero or nearly so" in bars
    assert section.legend.startswith("70.0 % of all entries of 2 weights")
    page = Page(render(trained()))
    assert "Training towards zeros" in page.text
    assert "Zeros after recovery" not in page.text


def test_bars_of_zeros_lie_on_those_of_near_zeros():
    (bars,) = plots.layer_zeros(LAYERS[:1], 0.5)
    found = dict(re.findall(r'width="([\d.]+)" height="[\d.]+" class="(near|kept|outline)"', bars))
    near, kept, outline = (float(width) for width in found)
    assert [*found.values()] == ["near", "kept", "outline"]
    assert near / outline == pytest.approx(0.625, abs=1e-3)
    assert kept / outline == pytest.approx(0.5, abs=1e-3)


def test_gates_have_the_curve_that_the_weights_have_not_yet():
    (section,) = zeros(complete(trained(zeros=[0.0] * 4, closed_gates=[0.0, 0.25, 0.5, 0.5])))
    labels = [re.search('aria-label="(.*?)"', plot)[1] for plot in section.curves]
    assert labels == ["training loss against step", "gates that are closed, % against step"]


def test_a_recovery_under_masks_shows_its_layers():
    summary = digits()
    summary["recover"] |= {"zeros": 0.7, "near_zeros": 0.71, "layers": LAYERS}
    (section,) = zeros(complete(summary))
    assert (section.title, section.curves) == ("Zeros after recovery", [])
    assert "Zeros after recovery" in Page(render(summary)).text


def test_a_training_that_has_not_ended_is_shown_as_far_as_it_is():
    summary = trained()
    summary["sparsify"] |= {"zeros": 0.75, "near_zeros": None, "layers": []}
    (section,) = zeros(complete(summary))
    assert section.layers == []
    assert "brought 75.0 % of the weights to zero." in " ".join(findings(complete(summary)))
    Page(render(summary))


def test_names_of_weights_and_methods_are_escaped():
    summary = trained()
    summary["sparsify"] |= {"method": EVIL, "layers": [{**LAYERS[0], "name": EVIL}]}
    page = render(summary)
    assert "<script" not in page
    assert Page(page).text.count(EVIL) == 4  # in a finding, in a caption, beside a bar and in its title


def test_the_terminal_has_a_line():
    console = Console(file=io.StringIO(), width=200)
    print_summary(trained(), console)
    lines = [line.strip() for line in console.file.getvalue().splitlines() if "towards zeros" in line]
    assert lines == ["Training towards zeros (cubic) brought 70.0 % of the weights to zero, 2.0 % next to it."]
