from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs import catalogue
from jobs.catalogue import CATALOGUE, Entry, plot, row, summarised, table


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Two epochs of four steps for each row, from random weights."""
    monkeypatch.setattr(catalogue, "EPOCHS", 2)
    monkeypatch.setattr(catalogue, "STEPS", 4)
    torch.manual_seed(0)
    return catalogue.network().state_dict()


ONE_OF_EACH = (
    "taylor",
    "snip_abs",
    "hard_concrete",
    "group_lasso",
    "rigl",
    "taylor, then snip_abs",
    "taylor, 3 rounds",
)


@pytest.mark.parametrize(
    "name", [n if n in ONE_OF_EACH else pytest.param(n, marks=pytest.mark.slow) for n in CATALOGUE]
)
def test_every_entry_ends_within_its_budget(brief: dict[str, Tensor], name: str):
    entry = CATALOGUE[name]
    if entry.rounds > 1:
        entry = dataclasses.replace(entry, rounds=2)
    found = row(entry, 0.2, 0, brief)
    assert 0.19 < found["remains"] <= 0.2
    assert 0 <= found["before"] <= 1
    assert 0 <= found["after"] <= 1


def test_entries_of_weights_meet_the_budget_to_the_element(brief: dict[str, Tensor]):
    found = row(CATALOGUE["snip_abs"], 0.1, 0, brief)
    assert round(found["remains"] * 93546) == 9354


def test_every_method_of_sparse_training_has_an_entry():
    from pipeline.training.policies import METHODS

    assert set(METHODS) <= {method for entry in CATALOGUE.values() for method in entry.method}


RESULTS = [
    {"entry": name, "budget": budget, "seed": seed, "after": after}
    for name, budget, seed, after in (
        ("random", 0.5, 0, 0.90),
        ("random", 0.5, 1, 0.92),
        ("random", 0.1, 0, 0.50),
        ("taylor", 0.5, 0, 0.95),
        ("taylor", 0.1, 0, 0.80),
    )
]


def test_figures_are_means_and_deviations_over_seeds():
    figures = summarised(RESULTS)
    assert figures["random"][0.5] == (pytest.approx(91.0), pytest.approx(2**0.5))
    assert figures["taylor"][0.1] == (pytest.approx(80.0), 0.0)
    assert table(RESULTS).splitlines() == [
        "| family | entry | prunes | 50% | 10% |",
        "|---|---|---|---|---|",
        "| control, channels | `random` | channels | 91.0 ± 1.4 | 50.0 ± 0.0 |",
        "| neurons | `taylor` | channels | 95.0 ± 0.0 | 80.0 ± 0.0 |",
    ]


def test_the_plot_is_the_same_file_for_the_same_results(tmp_path: Path):
    for name in ("a.svg", "b.svg"):
        plot(RESULTS, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text.startswith("<?xml")
    assert text == (tmp_path / "b.svg").read_text()


@pytest.mark.ray
def test_rows_that_are_done_are_not_computed_again(ray_cluster: None, tmp_path: Path):
    lines = tmp_path / "results.jsonl"
    done = {"entry": "taylor", "budget": 0.5, "seed": 0, "after": 0.9}
    lines.write_text(json.dumps(done) + "\n")
    assert catalogue.run(["taylor"], [0.5], [0], lines) == [done]
    assert isinstance(CATALOGUE["taylor"], Entry)
