"""Criteria: each against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.models.graph import Contraction, Graph, Group, Member
from pipeline.pruning.allocation import SCOPES
from pipeline.saliency.channel_rules import standard_error
from pipeline.saliency.criteria import CRITERIA, ranks, rule
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
    saliency = rule("channels", name).fn(GRAPH, STATISTICS, WEIGHTS, seed)
    assert list(saliency) == ["fc0"]
    assert saliency["fc0"].dtype == torch.float64
    return saliency["fc0"].tolist()


def test_taylor_is_the_mean_of_absolute_changes_of_each_row():
    assert score("taylor") == [1.0, 3.0, 1.5]


def test_fisher_is_half_the_mean_square():
    assert score("fisher") == [0.5, 5.0, 2.25]


def test_taylor_square_is_the_mean_square():
    assert score("taylor_square") == [1.0, 10.0, 4.5]


def test_group_fisher_divides_by_the_values_that_a_channel_makes():
    # fc0 writes each channel at 4 positions: 4 values for a row.
    graph = replace(GRAPH, contractions=(Contraction("fc0.weight", 4), Contraction("fc1.weight", 9)))
    saliency = rule("channels", "group_fisher").fn(graph, STATISTICS, WEIGHTS, 0)
    assert saliency["fc0"].tolist() == [0.125, 1.25, 0.5625]


def test_activation_moments_over_rows_and_positions():
    # Three channels over 4 entries: sums 4, -8, 0 and squares 6, 16, 20. Means 1, -2, 0; variances 1.5 - 1, 4 - 4, 5 - 0.
    statistics = {
        "input_sum/fc1.weight": torch.tensor([4.0, -8.0, 0.0]).double(),
        "input_square/fc1.weight": torch.tensor([6.0, 16.0, 20.0]).double(),
        "input_count/fc1.weight": torch.tensor(4),
    }
    mean = rule("channels", "activation_mean").fn(GRAPH, statistics, {}, 0)["fc0"]
    variance = rule("channels", "activation_variance").fn(GRAPH, statistics, {}, 0)["fc0"]
    assert mean.tolist() == [1.0, 2.0, 0.0]  # the group's mean is 1
    assert variance.tolist() == pytest.approx([0.5 / (5.5 / 3), 0.0, 5 / (5.5 / 3)])


def test_a_rule_for_weights_sums_over_what_a_channel_owns():
    # |w g| of fc0 row c plus fc1 column c; two rows.
    statistics = {
        "rows": torch.tensor(2),
        "grad_sum/fc0.weight": torch.tensor([[1.0, 5.0], [7.0, 7.0], [-2.0, 1.0]]),
        "grad_sum/fc1.weight": torch.tensor([[0.5, 9.0, -1.0]]),
    }
    saliency = rule("channels", "snip").fn(GRAPH, statistics, WEIGHTS, 0)["fc0"]
    assert saliency.tolist() == [(3 + 2) / 2, 0.0, (2 + 2 + 2) / 2]


def test_standard_error_of_a_mean_over_rows():
    # s of channel 0: 1 and -1 -> |s| = 1, 1: no error. Channel 1: 2, 4: mean 3, variance 1; two rows: sqrt(1/2).
    error = standard_error(GRAPH, STATISTICS, "gate_abs", "gate_square")["fc0"]
    assert error.tolist() == pytest.approx([0.0, 0.5**0.5, (4.5 - 2.25) ** 0.5 / 2**0.5])


def test_ranks_are_fractions_and_equals_share_theirs():
    assert ranks(torch.tensor([[3.0, 1.0], [1.0, torch.inf]])).tolist() == [[0.75, 0.375], [0.375, torch.inf]]


def test_nan_has_no_rank():
    with pytest.raises(ValueError, match="NaN, which has no rank"):
        ranks(torch.tensor([1.0, torch.nan]))


def test_joint_criteria_fuse_ranks_with_their_shares():
    # taylor (1, 3, 1.5) ranks 1/3, 1, 2/3; signed_taylor (0, 3, 1.5) the same; magnitude_l1 (7/4, 0, 5/4) ranks 1, 1/3, 2/3.
    joint = rule("channels", "taylor", "magnitude_l1", shares=(3.0, 1.0))
    assert joint.name == "0.75 taylor + 0.25 magnitude_l1"
    assert set(joint.needs) == {"gate_abs", "rows"}
    assert joint.scope == "layer"  # magnitude does not compete between layers
    fused = joint.fn(GRAPH, STATISTICS, WEIGHTS, 0)["fc0"]
    assert fused.tolist() == pytest.approx([0.25 + 0.25, 0.75 + 0.25 / 3, 2 / 3])
    assert rule("channels", "taylor", "fisher").scope == "flat"
    assert rule("channels", "taylor", "fisher").name == "taylor + fisher"
    with pytest.raises(ValueError, match="one positive number for each"):
        rule("channels", "taylor", "fisher", shares=(1.0,))


def test_joint_ranks_go_over_all_groups_where_the_criteria_compete_everywhere():
    graph = chain(2, 2, 2, 1)
    statistics = {
        "rows": torch.tensor(1),
        **{f"gate_abs/fc{i}": torch.tensor(v).double() for i, v in ((0, [1.0, 4.0]), (1, [2.0, 8.0]))},
        **{f"gate_square/fc{i}": torch.tensor(v).double() for i, v in ((0, [1.0, 16.0]), (1, [64.0, 4.0]))},
    }
    fused = rule("channels", "taylor", "fisher").fn(graph, statistics, {}, 0)
    assert fused["fc0"].tolist() == [(0.25 + 0.25) / 2, (0.75 + 0.75) / 2]
    assert fused["fc1"].tolist() == [(0.5 + 1.0) / 2, (1.0 + 0.5) / 2]


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
    assert rule("channels", "magnitude").fn(GRAPH, {}, weights, 0)["fc0"].tolist() == [0.0, 0.0, 0.0]


def test_magnitude_counts_all_positions_of_a_flattened_channel():
    model = Residual()
    weights = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    weights["fc.weight"][0, 28:32] = 1.0  # four entries of channel 7
    weights["b.weight"][2] = 0.5  # twelve entries of channel 2
    saliency = rule("channels", "magnitude_l1").fn(residual_graph(), {}, weights, 0)["conv"]
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
    saliency = rule("channels", "bn_scale").fn(graph, {}, weights, 0)
    assert saliency["g"].tolist() == [1.5, 0.25]
    assert saliency["bare"].tolist() == [torch.inf] * 3


def test_bn_scale_without_any_norm_is_refused():
    with pytest.raises(ValueError, match="no group passes through a norm"):
        score("bn_scale")


def test_random_depends_on_the_seed_and_the_name_alone():
    assert score("random", seed=0) == score("random", seed=0)
    assert score("random", seed=0) != score("random", seed=1)
    graph = chain(2, 3, 3, 1)
    saliency = rule("channels", "random").fn(graph, {}, {}, 0)
    assert saliency["fc0"].tolist() == score("random", seed=0)
    assert saliency["fc1"].tolist() != saliency["fc0"].tolist()


def test_random_is_golden():
    assert score("random") == [0.1240954252258073, 0.6177149517941973, 0.15648912928263115]


def test_a_criterion_changes_none_of_its_arguments():
    statistics = {name: value.clone() for name, value in STATISTICS.items()}
    weights = {name: value.clone() for name, value in WEIGHTS.items()}
    for name in ("taylor", "taylor_square", "signed_taylor", "fisher", "group_fisher", "magnitude_l1", "magnitude_l2"):
        saliency = rule("channels", name).fn(GRAPH, statistics, weights, 0)
        saliency["fc0"].fill_(-1.0)
    assert all(torch.equal(statistics[name], value) for name, value in STATISTICS.items())
    assert all(torch.equal(weights[name], value) for name, value in WEIGHTS.items())


def test_an_unknown_criterion_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'tailor' is unknown; known criteria for channels: .*bn_scale, fisher, .*taylor"
    ):
        rule("channels", "tailor")


def test_a_criterion_for_channels_alone_says_so():
    with pytest.raises(ValueError, match=r"'taylor' has no rule for weights; known .*fisher, gradient, .*wanda"):
        rule("weights", "taylor")
    with pytest.raises(ValueError, match=r"'wanda' has no rule for channels"):
        rule("channels", "wanda")


@pytest.mark.parametrize(("name", "key"), [("taylor", "rows"), ("fisher", "rows"), ("signed_taylor", "rows")])
def test_missing_statistics_are_named_with_the_way_out(name, key):
    with pytest.raises(ValueError, match=f"statistic '{key}' is missing.*Run the scoring pass.*magnitude_l2"):
        rule("channels", name).fn(GRAPH, {}, WEIGHTS, 0)


def test_a_group_without_statistics_is_named():
    with pytest.raises(ValueError, match=r"'gate_abs/fc1' is missing; the stored kinds are: gate_abs, gate_sq"):
        rule("channels", "taylor").fn(
            chain(2, 3, 4, 1), {k: v for k, v in STATISTICS.items() if "sum" not in k}, WEIGHTS, 0
        )


def test_statistics_of_another_network_are_refused():
    with pytest.raises(ValueError, match=r"'gate_abs/fc0' has shape \[3\], the group has 4"):
        rule("channels", "taylor").fn(chain(2, 4, 1), STATISTICS, WEIGHTS, 0)


def test_zero_rows_and_missing_weights_are_refused():
    with pytest.raises(ValueError, match="'rows' is 0"):
        rule("channels", "taylor").fn(GRAPH, {**STATISTICS, "rows": torch.tensor(0)}, WEIGHTS, 0)
    with pytest.raises(ValueError, match=r"weights lack fc0\.weight"):
        rule("channels", "magnitude").fn(GRAPH, {}, {}, 0)


def test_every_scope_is_one_that_there_is():
    for criterion in CRITERIA.values():
        assert criterion.channels is None or criterion.channels.scope in SCOPES
        assert criterion.weights is None or criterion.weights.scope in ("global", "layer", "row")


def test_every_rule_names_its_source():
    for name, criterion in CRITERIA.items():
        for one in filter(None, (criterion.channels, criterion.weights)):
            assert name == "random" or "Source:" in one.fn.__doc__ or "literature" in one.fn.__doc__, name


def test_taylor_of_a_real_network_is_the_first_order_change_of_its_loss():
    # The gate of a channel: scaling its input columns at every consumer by 1 - eps changes the loss by -eps * s.
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("fc0", torch.nn.Linear(2, 3))
    model.add_module("fc1", torch.nn.Linear(3, 4))
    model.double()
    images, labels, eps = torch.randn(1, 2, dtype=torch.float64), torch.tensor([1]), 1e-6
    statistics = accumulate(model, chain(2, 3, 4), [(images, labels)])
    taylor = rule("channels", "taylor").fn(chain(2, 3, 4), statistics, model.state_dict(), 0)["fc0"]

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
