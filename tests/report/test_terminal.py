"""Tables and bars as text."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from pipeline.report import terminal
from pipeline.report.progress import progress
from pipeline.report.status import StageStatus, Status
from tests.report.samples import SAMPLES, digits, sparse


def shown(printer, *arguments, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    printer(*arguments, console)
    return console.file.getvalue()


def test_summary_table_of_a_whole_run():
    lines = [line.strip() for line in shown(terminal.print_summary, digits()).splitlines()]
    assert lines[0] == "resnet10t"
    assert lines[2].split() == ["dense", "random", "magnitude", "ours", "(taylor)"]
    assert " ".join(lines[4].split()) == "top-1, cut 96.67 % 73.89 % −22.78 81.11 % −15.56 89.17 % −7.50"
    assert " ".join(lines[5].split()) == "top-1, recovered – – 96.94 % +0.27"
    macs = next(i for i, line in enumerate(lines) if line.startswith("MACs"))
    assert lines[macs + 1].startswith("latency, batch 1 ")
    onnx = next(line for line in lines if line.startswith("ONNX, batch 32"))
    assert " ".join(onnx.split()) == "ONNX, batch 32 17.9 ms – – 9.80 ms 54.7 %"


def test_the_quantised_network_has_a_table_of_its_own_where_there_is_one():
    text = shown(terminal.print_summary, digits())
    lines = [" ".join(line.split()) for line in text.splitlines()]
    at = lines.index("with INT8")
    assert lines[at + 2] == "dense cut cut + INT8"
    assert lines[at + 4 : at + 8] == [
        "top-1 96.67 % 96.94 % +0.27 96.67 % ±0.00",
        "size on disk 19.71 MB 8.670 MB 44.0 % 2.229 MB 11.3 %",
        "latency, batch 1 1.12 ms 0.61 ms 54.5 % 0.31 ms 27.7 %",
        "latency, batch 32 17.9 ms 9.80 ms 54.7 % 4.90 ms 27.4 %",
    ]
    assert "it gives the cut network's answer on 99.17 % of the rows" in " ".join(lines)
    assert "INT8" not in shown(terminal.print_summary, sparse())


@pytest.mark.parametrize("name", [*SAMPLES])
def test_summary_fits_eighty_columns(name):
    assert "…" not in shown(terminal.print_summary, SAMPLES[name]())
    assert (
        max(len(line.rstrip()) for line in shown(terminal.print_summary, SAMPLES[name](), width=200).splitlines()[:14])
        <= 80
    )


def test_missing_figures_are_dashes():
    text = shown(terminal.print_summary, sparse())
    assert "– not measured" in text
    assert "0.00" not in shown(terminal.print_summary, {})


def test_brackets_in_names_are_no_markup():
    summary = {**digits(), "model": "[red]net[/red]"}
    summary["saliency"]["criterion"] = "[/]"
    text = shown(terminal.print_summary, summary)
    assert "[red]net[/red]" in text
    assert "ours ([/])" in text


def test_status_is_a_table_and_what_it_leaves_open():
    stages = (
        StageStatus("round 1: [b]plan", "done", 100.0, 75.0, 1),
        StageStatus("round 2: score", "running", 200.0, 30.0, 2, "3 of 8 units", 50.0, 4.0, "head, process 7"),
        StageStatus("round 2: plan", "to come"),
    )
    lines = [" ".join(line.split()) for line in shown(terminal.print_status, Status(stages, False)).splitlines()]
    assert lines[1] == "stage state begun time left"
    assert re.fullmatch(r"round 1: \[b\]plan done \d\d-\d\d \d\d:\d\d 1 min 15 s", lines[3])
    assert re.fullmatch(r"round 2: score running, start 2 \d\d-\d\d \d\d:\d\d 30.0 s 50.0 s", lines[4])
    assert lines[5] == "round 2: plan to come"
    assert lines[-2:] == [
        "round 2: score: 3 of 8 units; last sign of life 4.0 s ago (head, process 7).",
        "At least about 50.0 s left.",
    ]


def test_a_traced_network_shows_that_no_time_was_taken():
    site = SimpleNamespace(module="conv2")
    group = SimpleNamespace(name="conv1", size=8, members=[SimpleNamespace(tensor="conv1.weight")], consumers=[site])
    frozen = SimpleNamespace(group="fc", size=10, operation="none", where="fc", reason="nobody reads [these]")
    graph = SimpleNamespace(groups=[group], blocks=[], frozen=[frozen])
    text = shown(terminal.print_graph, "net", graph, SimpleNamespace(params=1234, macs=5_000_000), width=120)
    text = " ".join(text.split())
    assert "net: 1 groups, 1.234 k params, 5.000 M MACs (latency: not measured)" in text
    assert "nobody reads [these]" in text


# --- progress ---------------------------------------------------------------------------------------------------------


class Ticking:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(interval_s: float, updates: list[tuple[float, int]], total: int = 100, **options) -> list[str]:
    stream, ticking = io.StringIO(), Ticking()
    with progress("score", total=total, stream=stream, interval_s=interval_s, clock=ticking, **options) as bar:
        for at, done in updates:
            ticking.now = at
            bar.update(done, loss=0.25)
    return stream.getvalue().splitlines()


BEGINS = "score: 0/100 rows, loss 0.25"


def test_a_file_gets_a_line_every_interval_with_rate_and_time_left():
    assert run(10, [(0, 0), (1, 4), (5, 20), (6, 24), (14, 56), (15, 60), (20, 80), (25, 100)]) == [
        BEGINS,
        "score: 20/100 rows, 4.00 rows/s, 20.0 s left, loss 0.25",
        "score: 60/100 rows, 4.00 rows/s, 10.0 s left, loss 0.25",
        "score: 100/100 rows, 4.00 rows/s, loss 0.25",
    ]


def test_a_stage_is_told_when_it_begins_and_at_its_first_progress():
    assert run(60, [(0, 0), (1, 0), (4, 0), (5, 10), (6, 20)])[:2] == [
        BEGINS,
        "score: 10/100 rows, 2.00 rows/s, 45.0 s left, loss 0.25",
    ]


def test_rows_of_an_earlier_start_do_not_count_into_the_rate():
    assert run(1, [(0, 60), (10, 80)])[1:] == ["score: 80/100 rows, 2.00 rows/s, 10.0 s left, loss 0.25"]


def test_the_last_state_is_shown_once():
    assert run(100, [(0, 0), (1, 30)]) == [BEGINS, "score: 30/100 rows, 30.0 rows/s, 2.3 s left, loss 0.25"]
    assert len(run(100, [(0, 0), (1, 100), (2, 100)])) == 2


def test_the_last_state_is_shown_also_after_an_error():
    stream = io.StringIO()

    def fail() -> None:
        with progress("score", total=4, stream=stream) as bar:
            bar.update(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert stream.getvalue() == "score: 3/4 rows\n"


def test_a_stage_without_rows_says_nothing():
    assert run(10, []) == []


def test_quiet_is_silent():
    assert run(0, [(0, 0), (1, 50), (2, 100)], quiet=True) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("term", "draws"), [("xterm-256color", True), ("dumb", False)])
def test_bars_are_drawn_on_a_terminal_that_can(monkeypatch, term, draws):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    with progress("recover [b]", total=2000, unit="rows", stream=stream) as bar:
        bar.update(0)
        bar.update(1000, loss=0.5)
    assert ("\x1b[" in stream.getvalue()) == draws
    assert "recover [b]" in stream.getvalue()
    assert "rows/s" in stream.getvalue()
    assert "loss 0.5" in stream.getvalue()
