"""Criteria: each against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from pipeline.models.graph import Graph, Group, Member
from pipeline.pruning.allocation import SCOPES
from pipeline.saliency.criteria import CRITERIA, find
from pipeline.saliency.statistics import accumulate
from tests.graphs import Residual, chain, index, residual_graph

# Two rows with s = (1, -2, 0) and s = (-1, -4, 3).
STATISTICS = {
    "rows": torch.tensor(2),
    "gate_sum/fc0": torch.tensor([0.0, -6.0, 3.0], dtype=torch.float64),
    "gate_abs/fc0": torch.tensor([2.0, 6.0, 3.0], dtype=torch.float64),
    "gate_square/fc0": torch.tensor([2.0, 20.0, 9.0], dtype=torch.float64),
}
# Channel c of fc0 owns row c of fc0.weight and column c of fc1.weight.
WEIGHTS = {
    "fc0.weight": torch.tensor([[3.0, 0.0], [0.0, 0.0], [1.0, -2.0]]),
    "fc0.bias": torch.tensor([100.0, 100.0, 100.0]),  # not a weight that is multiplied: must not count
    "fc1.weight": torch.tensor([[-4.0, 0.0, 2.0]]),
    "fc1.bias": torch.tensor([100.0]),
}
GRAPH = chain(2, 3, 1)


def score(name: str, seed: int = 0) -> list[float]:
    saliency = CRITERIA[name].fn(GRAPH, STATISTICS, WEIGHTS, seed)
    assert list(saliency) == ["fc0"]
    assert saliency["fc0"].dtype == torch.float64
    return saliency["fc0"].tolist()


def test_taylor_is_the_mean_of_absolute_changes_of_each_row():
    assert score("taylor") == [1.0, 3.0, 1.5]


def test_fisher_is_half_the_mean_square():
    assert score("fisher") == [0.5, 5.0, 2.25]


def test_signed_taylor_lets_rows_cancel():
    assert score("signed_taylor") == [0.0, 3.0, 1.5]


def test_magnitude_l1_of_all_weights_that_a_channel_owns():
    # 3 + 4, 0, 3 + 2: mean 4
    assert score("magnitude_l1") == [7 / 4, 0.0, 5 / 4]


def test_magnitude_l2_of_all_weights_that_a_channel_owns():
    # sqrt(9 + 16) = 5, 0, sqrt(1 + 4 + 4) = 3: mean 8/3
    assert score("magnitude_l2") == pytest.approx([15 / 8, 0.0, 9 / 8], rel=1e-15)
    assert score("magnitude") == score("magnitude_l2")


def test_magnitude_of_a_group_of_zeros_is_zero():
    weights = {name: torch.zeros_like(tensor) for name, tensor in WEIGHTS.items()}
    assert CRITERIA["magnitude"].fn(GRAPH, {}, weights, 0)["fc0"].tolist() == [0.0, 0.0, 0.0]


def test_magnitude_counts_all_positions_of_a_flattened_channel():
    model = Residual()
    weights = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    weights["fc.weight"][0, 28:32] = 1.0  # four entries of channel 7
    weights["b.weight"][2] = 0.5  # twelve entries of channel 2
    saliency = CRITERIA["magnitude_l1"].fn(residual_graph(), {}, weights, 0)["conv"]
    # 4 and 6 of the 8 channels' mean 10/8
    assert saliency.tolist() == [0, 0, 6 / 1.25, 0, 0, 0, 0, 4 / 1.25]


def test_bn_scale_is_the_mean_absolute_scale_of_all_norms_of_a_group():
    norms = tuple(Member(f"{name}.weight", 0, index(2), "affine") for name in ("bn", "bn_a"))
    prelu = Member("act.weight", 0, index(2), "affine")
    shapes = {name: (2,) for name in ("bn.weight", "bn.bias", "bn_a.weight", "bn_a.running_mean", "act.weight", "w")}
    groups = (Group("g", 2, (*norms, prelu), ()), Group("bare", 3, (Member("w", 0, index(3), "out"),), ()))
    graph = Graph(groups, (), (), shapes, ("bn.weight", "bn_a.weight", "act.weight", "w"), (1, 2))
    weights = {
        "bn.weight": torch.tensor([-1.0, 0.5]),
        "bn_a.weight": torch.tensor([2.0, 0.0]),
        "act.weight": torch.tensor([99.0, 99.0]),
    }
    saliency = CRITERIA["bn_scale"].fn(graph, {}, weights, 0)
    assert saliency["g"].tolist() == [1.5, 0.25]
    assert saliency["bare"].tolist() == [torch.inf] * 3


def test_bn_scale_without_any_norm_is_refused():
    with pytest.raises(ValueError, match="no group passes through a norm"):
        score("bn_scale")


def test_random_depends_on_the_seed_and_the_name_alone():
    assert score("random", seed=0) == score("random", seed=0)
    assert score("random", seed=0) != score("random", seed=1)
    graph = chain(2, 3, 3, 1)
    saliency = CRITERIA["random"].fn(graph, {}, {}, 0)
    assert saliency["fc0"].tolist() == score("random", seed=0)
    assert saliency["fc1"].tolist() != saliency["fc0"].tolist()


def test_random_is_golden():
    assert score("random") == [0.1240954252258073, 0.6177149517941973, 0.15648912928263115]


def test_a_criterion_changes_none_of_its_arguments():
    statistics = {name: value.clone() for name, value in STATISTICS.items()}
    weights = {name: value.clone() for name, value in WEIGHTS.items()}
    for name in set(CRITERIA) - {"bn_scale"}:
        saliency = CRITERIA[name].fn(GRAPH, statistics, weights, 0)
        saliency["fc0"].fill_(-1.0)
    assert all(torch.equal(statistics[name], value) for name, value in STATISTICS.items())
    assert all(torch.equal(weights[name], value) for name, value in WEIGHTS.items())


def test_an_unknown_criterion_lists_the_known_ones():
    assert find("taylor") is CRITERIA["taylor"]
    with pytest.raises(ValueError, match=r"'tailor' is unknown; known criteria: bn_scale, fisher, .*taylor"):
        find("tailor")


@pytest.mark.parametrize(("name", "key"), [("taylor", "rows"), ("fisher", "rows"), ("signed_taylor", "rows")])
def test_missing_statistics_are_named_with_the_way_out(name, key):
    with pytest.raises(ValueError, match=f"statistic '{key}' is missing.*Run the scoring pass.*magnitude_l2"):
        CRITERIA[name].fn(GRAPH, {}, WEIGHTS, 0)


def test_a_group_without_statistics_is_named():
    with pytest.raises(ValueError, match=r"'gate_abs/fc1' is missing; the stored kinds are: gate_abs, gate_sq"):
        CRITERIA["taylor"].fn(chain(2, 3, 4, 1), {k: v for k, v in STATISTICS.items() if "sum" not in k}, WEIGHTS, 0)


def test_statistics_of_another_network_are_refused():
    with pytest.raises(ValueError, match=r"'gate_abs/fc0' has shape \[3\], the group has 4"):
        CRITERIA["taylor"].fn(chain(2, 4, 1), STATISTICS, WEIGHTS, 0)


def test_zero_rows_and_missing_weights_are_refused():
    with pytest.raises(ValueError, match="'rows' is 0"):
        CRITERIA["taylor"].fn(GRAPH, {**STATISTICS, "rows": torch.tensor(0)}, WEIGHTS, 0)
    with pytest.raises(ValueError, match=r"weights lack fc0\.weight"):
        CRITERIA["magnitude"].fn(GRAPH, {}, {}, 0)


def test_loss_based_criteria_compete_globally_and_data_free_ones_by_layer():
    assert {criterion.scope for criterion in CRITERIA.values()} <= set(SCOPES)
    for criterion in CRITERIA.values():
        assert criterion.scope == ("global" if criterion.needs else "layer")


def test_taylor_of_a_real_network_is_the_first_order_change_of_its_loss():
    # The gate of a channel: scaling its input columns at every consumer by 1 - eps changes the loss by -eps * s.
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("fc0", torch.nn.Linear(2, 3))
    model.add_module("fc1", torch.nn.Linear(3, 4))
    model.double()
    images, labels, eps = torch.randn(1, 2, dtype=torch.float64), torch.tensor([1]), 1e-6
    statistics = accumulate(model, chain(2, 3, 4), [(images, labels)])
    taylor = CRITERIA["taylor"].fn(chain(2, 3, 4), statistics, model.state_dict(), 0)["fc0"]

    def loss() -> float:
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(model(images), labels, reduction="sum"))

    for channel in range(3):
        column = model.fc1.weight.data[:, channel].clone()
        model.fc1.weight.data[:, channel] = column * (1 + eps)
        above = loss()
        model.fc1.weight.data[:, channel] = column * (1 - eps)
        change = abs(above - loss()) / (2 * eps)
        model.fc1.weight.data[:, channel] = column
        # GateStatistics takes the loss in float32: six digits of the gradient remain.
        assert taylor[channel].item() == pytest.approx(change, rel=1e-3, abs=1e-5)
