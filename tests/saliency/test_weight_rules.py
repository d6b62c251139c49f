"""Rules for weights: each against numbers worked out by hand on three weights."""

from __future__ import annotations

import pytest
import torch

from pipeline.saliency.criteria import rule

W = torch.tensor([[2.0, -1.0, 0.5]])
# Two micro-batches of two rows: g = (1, -2, 4) and g = (-3, -2, 0).
STATISTICS = {
    "rows": torch.tensor(4),
    "grad_sum/w": torch.tensor([[-2.0, -4.0, 4.0]]),
    "grad_abs/w": torch.tensor([[4.0, 4.0, 4.0]]),
    "grad_square/w": torch.tensor([[10.0, 8.0, 16.0]]),
    "hessian_diag/w": torch.tensor([[4.0, 8.0, -16.0]]),
    "hessian_grad/w": torch.tensor([[1.0, 2.0, -8.0]]),
    "input_square/w": torch.tensor([4.0, 9.0, 16.0]),
    "movement/w": torch.tensor([[0.25, -0.5, 3.0]]),
}


def score(name: str, weight: torch.Tensor = W, **statistics: torch.Tensor) -> list:
    values = rule("weights", name).fn("w", {**STATISTICS, **statistics}, {"w": weight}, 0)
    assert values.dtype == torch.float64
    assert values.shape == weight.shape
    return values.tolist()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("magnitude", [2.0, 1.0, 0.5]),
        ("gradient", [1.0, 1.0, 1.0]),  # sum |g| / 4
        ("snip", [1.0, 1.0, 0.5]),  # |2 * -2| / 4, |-1 * -4| / 4, |0.5 * 4| / 4
        ("snip_abs", [2.0, 1.0, 0.5]),  # the first weight's batches no longer cancel
        ("fisher", [5.0, 1.0, 0.5]),  # 4 * 10 / 8, 1 * 8 / 8, 0.25 * 16 / 8
        ("obd", [2.0, 1.0, -0.5]),  # 4 * 4 / 8, 1 * 8 / 8, 0.25 * -16 / 8
        ("grasp", [0.5, -0.5, -1.0]),  # 2 * 1 / 4, -1 * 2 / 4, 0.5 * -8 / 4
        ("movement", [0.25, -0.5, 3.0]),
        ("wanda", [4.0, 3.0, 2.0]),  # |w| * 2, 3, 4
    ],
)
def test_a_hand_worked_row(name, expected):
    assert score(name) == [expected]


def test_lamp_divides_by_what_is_not_smaller():
    # Squares 4, 1, 0.25: 4 / 4, 1 / 5, 0.25 / 5.25.
    assert score("lamp")[0] == pytest.approx([1.0, 0.2, 0.25 / 5.25])


def test_lamp_of_equal_weights_keeps_the_first_and_zeros_score_zero():
    assert score("lamp", torch.tensor([[0.0, 1.0, -1.0]])) == [[0.0, 1.0, 0.5]]


def test_wanda_of_a_grouped_convolution_reads_the_inputs_of_its_group():
    # Two groups of one output and two inputs each, kernel 1 x 1: output 1 sees inputs 2 and 3.
    weight = torch.tensor([[1.0, 1.0], [1.0, -1.0]])[..., None, None]
    norms = {"input_square/w": torch.tensor([1.0, 4.0, 9.0, 16.0])}
    assert torch.tensor(score("wanda", weight, **norms)).flatten(1).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(ValueError, match=r"has 3 features, the weight is \[2, 2, 1, 1\]"):
        score("wanda", weight)


def test_random_weights_depend_on_the_seed_and_the_name_alone():
    draw = rule("weights", "random").fn
    state = {"w": W, "v": W}
    assert draw("w", {}, state, 0).tolist() == draw("w", {}, state, 0).tolist()
    assert draw("w", {}, state, 0).tolist() != draw("w", {}, state, 1).tolist()
    assert draw("w", {}, state, 0).tolist() != draw("v", {}, state, 0).tolist()


def test_joint_criteria_fuse_ranks_within_a_tensor():
    # magnitude ranks 1, 2/3, 1/3; movement ranks 2/3, 1/3, 1.
    joint = rule("weights", "magnitude", "movement")
    assert joint.scope == "layer"
    fused = joint.fn("w", STATISTICS, {"w": W}, 0)
    assert fused[0].tolist() == pytest.approx([5 / 6, 1 / 2, 2 / 3])


@pytest.mark.parametrize("name", ["gradient", "snip", "snip_abs", "fisher", "obd", "grasp", "wanda", "movement"])
def test_a_missing_statistic_is_named_with_the_way_out(name):
    with pytest.raises(ValueError, match=r"statistic '(\w+/w|rows)' is missing; .* score\.statistics"):
        rule("weights", name).fn("w", {}, {"w": W}, 0)
