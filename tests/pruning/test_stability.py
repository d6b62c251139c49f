"""How plans and saliencies are compared: numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from pipeline.pruning.plan import planned
from pipeline.pruning.stability import plan_change, rank_correlation, relative_error
from tests.graphs import chain


def test_the_change_of_a_plan_is_the_share_of_removals_not_in_common():
    graph = chain(2, 4, 4, 1)
    first = planned(graph, {"fc0": [0, 1], "fc1": [0, 1, 2, 3]})  # removes fc0: 2, 3
    second = planned(graph, {"fc0": [0, 1, 2], "fc1": [1, 2, 3]})  # removes fc0: 3, fc1: 0
    assert plan_change(first, first) == 0.0
    assert plan_change(first, second) == 2 / 4
    assert plan_change(planned(graph, {}), planned(graph, {})) == 0.0


def test_rank_correlation_over_all_groups():
    a = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([3.0, 4.0])}
    assert rank_correlation(a, a) == pytest.approx(1.0)
    assert rank_correlation(a, {"y": torch.tensor([2.0, 1.0]), "x": torch.tensor([4.0, 3.0])}) == pytest.approx(-1.0)
    # ranks 1 2 3 4 against 2 1 3 4: 1 - 6 * 2 / (4 * 15)
    assert rank_correlation(a, {"x": torch.tensor([2.0, 1.0]), "y": torch.tensor([3.0, 4.0])}) == pytest.approx(0.8)


def test_relative_errors_leave_out_what_has_no_saliency():
    saliency = {"x": torch.tensor([1.0, 0.0, 4.0])}
    assert relative_error(saliency, {"x": torch.tensor([0.1, 5.0, 2.0])}) == pytest.approx({"median": 0.5, "p90": 0.1})
    assert relative_error({"x": torch.zeros(2)}, {"x": torch.zeros(2)}) == {"median": 0.0, "p90": 0.0}
