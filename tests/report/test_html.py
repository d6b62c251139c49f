"""The page: self-contained, escaped, whole with any part missing, no MACs without a time."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any

import pytest

from pipeline.report import plots
from pipeline.report.html import class_extremes, comparison, findings, foretold, headline, key_figures, render
from pipeline.report.numbers import complete
from pipeline.report.svg import Frame, Label, settle, ticks
from tests.report.samples import SAMPLES, digits, resnet152, sparse

EVIL = "<script>alert('&\"1\"')</script>"


class Page(HTMLParser):
    """Tags, attributes and text of a page; void elements aside, every tag must be closed in order."""

    VOID = frozenset({"meta", "br", "rect", "circle", "line", "path"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text += data


FORECAST = {
    "seconds": 3600.0,
    "worker_hours": 8.0,
    "cost": 20.0,
    "used_seconds": 4500.0,
    "used_worker_hours": 10.0,
    "used_cost": 25.0,
    "price_per_hour": 2.5,
    "stages": [
        {"name": "score", "forecast_seconds": 100.0, "share_done": 0.06, "seconds": 120.0},
        {"name": "recover", "forecast_seconds": 300.0, "share_done": 0.0, "seconds": 200.0},
        {"name": "evaluate-after", "forecast_seconds": 50.0, "share_done": 0.0, "seconds": None},
    ],
}


def test_forecast_and_fact_stand_side_by_side_where_there_was_one():
    lines = foretold(complete({**digits(), "forecast": FORECAST}))
    assert [(line.name, line.forecast, line.fact, line.ratio, line.note) for line in lines] == [
        ("score", "1 min 40 s", "2 min 00 s", "1.20", "after 6 % of it"),
        ("recover", "5 min 00 s", "3 min 20 s", "0.67", ""),
        ("evaluate-after", "50.0 s", "–", "", ""),
        ("together", "6 min 40 s", "5 min 20 s", "0.80", ""),
    ]
    shown = Page(render({**digits(), "forecast": FORECAST})).text
    assert "Forecast and fact" in shown
    assert (
        "The first forecast of the whole run was 1 h 00 min and 8.00 worker-hours, at a price of 20.00. "
        "It came to 1 h 15 min and 10.0 worker-hours, at a price of 25.00." in shown
    )
    assert "It came to" not in Page(render({**digits(), "forecast": {**FORECAST, "used_worker_hours": None}})).text
    assert "Forecast" not in Page(render(digits())).text


def test_the_quantised_network_stands_beside_the_others_where_there_is_one():
    shown = Page(render(digits())).text
    assert "With INT8" in shown
    assert "19.71 MB" in shown
    assert "ranges of the activations from 512 training rows" in shown.replace("\u00a0", " ")
    assert "INT8" not in Page(render(sparse())).text


@pytest.mark.parametrize("name", [*SAMPLES])
def test_a_page_is_well_formed_and_loads_nothing(name):
    page = render(SAMPLES[name]())
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "image", "use"} & set(parsed.tags)
    assert not {"src", "href", "xlink:href"} & {key for key, _ in parsed.attributes}
    assert "url(" not in page
    assert "@import" not in page
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(drawing)
    assert "nan" not in re.findall(r'[xy12cd]+="([^"]*)"', page)


def test_text_from_outside_is_escaped_wherever_it_stands():
    summary = digits()
    summary["model"] = EVIL
    summary["controls"][EVIL] = {**summary["controls"]["random"], "scope": EVIL}
    summary["saliency"]["criterion"] = EVIL
    summary["plan"]["groups"][0]["name"] = EVIL
    summary["frozen"][0] = dict.fromkeys(("group", "operation", "where", "reason"), EVIL) | {"size": 3}
    summary["stages"].append({"name": EVIL, "state": EVIL})
    summary["bad_rows"] = [{"file": EVIL, "row_group": 0, "row": 1, "cause": EVIL}]
    summary["per_class"][0]["class"] = EVIL
    summary["dense"]["latency_ms"][EVIL] = summary["pruned"]["latency_ms"][EVIL] = 1.0
    summary["environment"] |= {"command": EVIL, EVIL: EVIL, "versions": {EVIL: EVIL}}
    summary["data"]["train"] = EVIL
    page = render(summary)
    assert "<script" not in page
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert parsed.text.count(EVIL) >= 15


def test_many_classes_are_escaped_too():
    summary = resnet152()
    for one in summary["per_class"]:
        one["class"] = EVIL
    assert "<script" not in render(summary)


@pytest.mark.parametrize("part", [*digits()])
def test_a_page_stands_without_any_one_part(part):
    for summary in ({**digits(), part: None}, {k: v for k, v in digits().items() if k != part}):
        Page(render(summary))


def test_an_empty_summary_is_a_page_that_says_so():
    text = Page(render({})).text
    assert "Not in this run: accuracy, latency, controls, saliency, plan, check of the cut, recovery" in text
    assert "0.00" not in text


def test_headline_of_a_whole_run():
    assert headline(complete(resnet152())) == (
        "resnet152.tv2_in1k with 50.0 % of its MACs runs 1.65× as fast at batch 32: top-1 goes from 82.28 % to 81.57 %"
    )


def test_headline_has_no_macs_without_a_time():
    assert headline(complete(sparse())) == (
        "resnet10t with 44.0 % of its parameters: top-1 goes from 96.67 % to 89.17 %, before any recovery"
    )


def test_onnx_runtime_has_its_rows_below_the_latencies_only_where_it_was_measured():
    rows = comparison(complete(digits()))
    assert [row for row, _ in rows][-4:] == [
        "latency, batch 1", "latency, batch 32", "ONNX, batch 1", "ONNX, batch 32",
    ]  # fmt: skip
    cells = [(cell.value, cell.note) for cell in rows[-1][1]]
    assert cells == [("17.9 ms", ""), ("–", ""), ("–", ""), ("9.80 ms", "54.7 %")]
    page = Page(render(digits())).text
    assert "ONNX, batch 32" in page
    assert "ONNX Runtime was timed on the CPU" in page
    assert "ONNX" not in Page(render(resnet152())).text


@pytest.mark.parametrize("name", [*SAMPLES])
def test_a_latency_stands_right_below_the_macs(name):
    rows = comparison(complete(SAMPLES[name]()))
    names = [row for row, _ in rows]
    after = rows[names.index("MACs of one row") + 1]
    assert after[0].startswith("latency")
    assert all(cell.value.endswith("ms") or cell.note == "not measured" for cell in after[1])


def test_table_of_hand_worked_ratios():
    summary = complete(
        {
            "dense": {"top1": 0.8, "params": 200, "macs": 4000, "latency_ms": {"1": 10.0}},
            "pruned": {"top1_before_recovery": 0.5, "top1": 0.79, "params": 50, "macs": 1000, "latency_ms": {"1": 4.0}},
        }
    )
    rows = {name: [(cell.value, cell.note) for cell in cells] for name, cells in comparison(summary)}
    assert rows["top-1 before recovery"] == [("80.00 %", ""), ("50.00 %", "−30.00")]
    assert rows["top-1 after recovery"] == [("79.00 %", "−1.00")]
    assert rows["parameters"] == [("200", ""), ("50", "25.0 %")]
    assert rows["latency, batch 1"] == [("10.0 ms", ""), ("4.00 ms", "40.0 %")]


def test_findings_say_it_when_a_control_is_better():
    summary = digits()
    summary["controls"]["random"]["top1_before_recovery"] = 0.95
    assert "5.83 points below random and 8.06 points above magnitude" in findings(complete(summary))[0]


def test_standard_error_of_a_hand_worked_accuracy():
    found = findings(complete({"pruned": {"top1": 0.5}, "data": {"val_rows": 2500}}))
    assert "Measured on 2,500 validation rows: one standard error of a top-1 is 1.00 points." in found


def test_every_group_is_drawn_with_its_numbers():
    groups = resnet152()["plan"]["groups"]
    drawn = "".join(plots.kept_channels(groups))
    assert len(groups) == 105
    assert all(f"{g['name']}: {g['kept']} of {g['size']} channels" in drawn for g in groups)
    assert drawn.count('class="outline"') == 105


def test_bars_are_as_long_as_the_kept_share():
    (drawn,) = plots.kept_channels([{"name": "a", "size": 8, "kept": 2}, {"name": "b", "size": 8, "kept": 0}])
    kept = [float(w) for w in re.findall(r'width="([\d.]+)" height="[\d.]+" class="kept"', drawn)]
    full = [float(w) for w in re.findall(r'width="([\d.]+)" height="[\d.]+" class="outline"', drawn)]
    assert kept[0] / full[0] == pytest.approx(0.25, abs=1e-3)
    assert kept[1] == 0


def test_a_loss_that_is_not_finite_breaks_the_curve():
    history = [{"step": i, "loss": None if i == 3 else 1.0} for i in range(1, 7)]
    assert plots.curve(history, "loss", "loss").count('class="curve"') == 2
    assert plots.curve([{"step": 1, "loss": None}], "loss", "loss") is None


def test_a_figure_measured_now_and_then_is_one_curve():
    history = [{"step": i, "loss": 1.0} | ({"top1": 0.5} if i % 2 else {}) for i in range(1, 7)]
    assert plots.curve(history, "top1", "top-1").count('class="curve"') == 1


def test_a_long_curve_keeps_its_spikes():
    thinned = plots._thinned([(float(i), 9.0 if i == 4321 else 1.0) for i in range(10_000)])
    assert len(thinned) <= 602
    assert (4321.0, 9.0) in thinned
    assert thinned == sorted(thinned)


def test_stages_stand_in_the_order_of_time():
    stages = [("b", "done", 1.0, 2.0, 3), ("c", "running", None, None, 1), ("a", "done", 1.0, 1.0, 1)]
    keys = ("name", "state", "seconds", "started", "attempts")
    drawn = plots.stage_times([dict(zip(keys, stage, strict=True)) for stage in stages])
    assert drawn is not None
    assert re.findall(">([abc])<", drawn) == ["a", "b", "c"]
    assert ">running<" in drawn
    assert drawn.count("start 3") == 1


def test_extremes_name_only_what_changed():
    classes = [
        {"class": c, "dense": 0.5, "pruned": 0.5 + d} for c, d in zip("abcd", (0.0, 0.25, -0.25, 0.125), strict=True)
    ]
    assert [(title, [row[0] for row in rows]) for title, rows in class_extremes(classes)] == [
        ("Lost most", ["c"]),
        ("Gained most", ["b", "d"]),
    ]


def test_a_label_does_not_cover_the_next_mark():
    frame = Frame((0, 1), (0, 1), "x", "y", right=100)
    labels = [Label(frame.x(0.8), 100, "ours 96.94 %"), Label(frame.x(0.95), 103, "dense 96.67 %")]
    settle(labels, frame)
    assert [label.left for label in labels] == [True, False]


def test_labels_of_one_spot_spread():
    frame = Frame((0, 1), (0, 1), "x", "y")
    labels = [Label(frame.x(0.5), frame.y(0.5), f"label {i}") for i in range(4)]
    settle(labels, frame)
    at = sorted(label.at for label in labels)
    assert min(b - a for a, b in itertools.pairwise(at)) > 13.5
    assert sum(at) / 4 == pytest.approx(frame.y(0.5), abs=0.5)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 11.5), (71.2, 98.9), (0.2, 0.21), (-3, 40_000)])
def test_ticks_lie_inside_and_are_few(low, high):
    values = ticks(low, high)
    assert 2 <= len(values) <= 7
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in values)


def masked() -> dict[str, Any]:
    """`digits`, masked to a quarter of the dense network's 4,927,618 parameters."""
    summary = digits()
    summary["pruned"]["nonzero_params"] = 1231904
    for control in summary["controls"].values():
        control["nonzero_params"] = 1231900
    figures = {"pattern": "unstructured", "criterion": "snip_abs", "scope": "global", "sha256": "ab", "num_whole": 0}
    summary["weight_masks"] = {**figures, "kept": 1000000, "weights": 2000000}
    return summary


def test_masked_weights_have_a_row_of_their_own_and_no_time_to_their_credit():
    rows = {name: [(cell.value, cell.note) for cell in cells] for name, cells in comparison(complete(masked()))}
    names = [*rows]
    assert names[names.index("parameters") + 1 :][:2] == ["non-zero parameters", "MACs of one row"]
    assert rows["non-zero parameters"] == [
        ("4.928 M", ""),
        ("1.232 M", "25.0 %"),
        ("1.232 M", "25.0 %"),
        ("1.232 M", "25.0 %"),
    ]
    assert findings(complete(masked()))[-1] == (
        "Masks of single weights (unstructured, snip_abs) keep 50.0 % of 2.000 M weights that the cut leaves. A dense runtime gains no "
        "time from them."
    )
    assert headline(complete(masked())).startswith(
        "resnet10t with 49.9 % of its MACs and 25.0 % of its parameters not zero runs 1.42× as fast at batch 32: top-1"
    )
    assert [figure.name for figure in key_figures(complete(masked()))][1] == "non-zero parameters"


def test_where_nothing_is_masked_parameters_stand_once():
    summary = digits()
    summary["pruned"]["nonzero_params"] = summary["pruned"]["params"]
    assert "non-zero parameters" not in [name for name, _ in comparison(complete(summary))]


def test_a_page_of_masks_alone_shows_no_widths_and_the_scope_of_the_weights():
    summary = masked()
    summary["plan"] |= {"budget": {}, "scope": None}
    page = Page(render(summary)).text
    assert "Kept channels of each layer" not in page
    assert "ours (taylor)global scope" in page
    assert "Not in this run: plan" not in page


def test_what_training_for_sparsity_cost_is_told():
    found = findings(complete({"dense": {"top1": 0.9}, "sparse": {"top1": 0.875}}))
    assert found == [
        "Before anything was cut, and with batch norm as training towards zeros left it, top-1 went from 90.00 % to 87.50 %."
    ]
