"""The README tells what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.saliency.criteria import CRITERIA, Rule
from pipeline.training.policies import METHODS

README = (Path(__file__).parent.parent / "README.md").read_text()


def row_of(name: str) -> list[str]:
    line = next(
        (line for line in README.splitlines() if line.startswith("| `") and f"`{name}`" in line.split(" | ")[0]), ""
    )
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_has_its_line_with_what_it_scores(name: str):
    _, channels, weights, _, source = row_of(name)

    def told(cell: str, rule: Rule | None) -> bool:
        return bool(cell) == (rule is not None)

    assert told(channels, CRITERIA[name].channels)
    assert told(weights, CRITERIA[name].weights)
    assert source or name in ("random", "gradient")


def test_every_method_of_sparse_training_has_its_line():
    section = README.split("## Training towards zeros")[1].split("\n## ")[0]
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("| `")]
    acts_on = {line[0].strip(" `"): line[1].strip() for line in lines[1:]}
    told = {"either": "channels, or weights"}
    assert acts_on == {name: told.get(method.acts_on, method.acts_on) for name, method in METHODS.items()}


def test_the_files_that_the_readme_links_are_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if "://" not in link and not (Path(__file__).parent.parent / link).exists()] == []
