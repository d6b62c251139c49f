"""The README tells what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.saliency.criteria import CRITERIA, Rule

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


def test_the_files_that_the_readme_links_are_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if "://" not in link and not (Path(__file__).parent.parent / link).exists()] == []
