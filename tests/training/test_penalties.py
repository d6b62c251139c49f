from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from pipeline.models.graph import Graph
from pipeline.pruning import allocation
from pipeline.pruning.plan import Budget
from pipeline.pruning.surgery import cut
from pipeline.pruning.trials import trace
from pipeline.pruning.verify import verify
from pipeline.saliency.channel_rules import magnitude_l2
from pipeline.training.entries import remaining_cost
from pipeline.training.penalties import (
    BnSlimming,
    GroupLasso,
    Growing,
    L0Sign,
    L1Prox,
    L1Sign,
    adaptive_share,
    group_factor,
    l0_sign_step,
    sign_step,
    soft_threshold,
)
from pipeline.training.policies import Aim, policies
from tests.graphs import chain
from tests.training.sparse import WEIGHTS, Batches, Line, accuracy, graph, network, on, trained
from tests.training.toy import same_tensors

CHANCE = 0.25
W = torch.tensor([0.5, -0.25, 0.05])


def close(found: torch.Tensor, expected: list[float]) -> bool:
    return torch.allclose(found, torch.tensor(expected), atol=1e-7)


# --- three weights by hand --------------------------------------------------------------------------------------------


def test_the_sign_step_of_l1_passes_over_zero():
    assert close(sign_step(W, 0.1), [0.4, -0.15, -0.05])


def test_the_proximal_step_of_l1_stops_at_zero():
    assert close(soft_threshold(W, 0.1), [0.4, -0.15, 0.0])
    assert soft_threshold(W, 0.1)[2] == 0


def test_the_proximal_step_of_the_group_lasso_scales_a_channel_or_takes_it_away():
    norms = torch.tensor([5.0, 0.5, 0.0])
    assert close(group_factor(norms, 1.0), [0.8, 0.0, 0.0])


@pytest.mark.parametrize(
    ("weight", "grad", "after"),
    [
        (0.5, 2.0, 0.4),  # positive, agrees: shrinks
        (0.5, -2.0, 0.6),  # positive, disagrees: grows
        (-0.5, -2.0, -0.6),  # negative, agrees: grows
        (-0.5, 2.0, -0.4),  # negative, disagrees: shrinks
        (0.5, 0.0, 0.5),
        (0.0, 2.0, 0.0),
    ],
)
def test_the_text_books_l0_rule_shrinks_weights_with_a_positive_gradient(weight, grad, after):
    assert close(l0_sign_step(torch.tensor([weight]), torch.tensor([grad]), 0.1), [after])


@pytest.mark.parametrize(
    ("kind", "after"),
    [(L1Sign, [0.4, -0.15, -0.05]), (L1Prox, [0.4, -0.15, 0.0]), (L0Sign, [0.4, -0.15, -0.05])],
)
def test_a_penalty_takes_its_strength_in_average_weights_over_the_whole_training(kind, after):
    model = Line([0.5, -0.25, 0.05])
    model.weight.grad = torch.tensor([[1.0, 1.0, 1.0]])
    policy = kind(on(model, lr_sum=2.0), names=["weight"], strength=1.5)
    policy.after_update(0, 0.5)  # a quarter of the sum of rates, of 1.5 times the average 0.8 / 3: 0.1
    assert close(model.weight[0].detach(), after)


def two_layers() -> tuple[nn.Sequential, Graph]:
    """fc0 [2, 1], fc1 [1, 2]: channel 0 owns 3, 4 and bias 0, channel 1 owns 0.3, 0.4 and bias 0."""
    model = nn.Sequential()
    model.add_module("fc0", nn.Linear(1, 2))
    model.add_module("fc1", nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0], [0.3]]))
        model[1].weight.copy_(torch.tensor([[4.0, 0.4]]))
        model[0].bias.zero_()
        model[1].bias.fill_(7.0)
    return model, chain(1, 2, 1)


def test_the_least_norm_feels_the_whole_penalty_and_the_largest_a_sixteenth():
    norm_C = torch.tensor([1.0, 2.0, 3.0])
    assert close(adaptive_share(norm_C, norm_C.min(), norm_C.max()), [1.0, 0.25, 0.0625])
    assert close(adaptive_share(torch.ones(2), torch.tensor(1.0), torch.tensor(1.0)), [1.0, 1.0])


def test_the_group_lasso_scales_all_that_a_channel_owns_and_nothing_else():
    model, groups = two_layers()
    # Norms are 5 and 0.5, 2.75 on average: half of the sum of rates takes 1 from the least and 1/16 from the largest; nothing is left alone.
    GroupLasso(on(model), graph=groups, strength=2 / 2.75, min_keep=0.0).after_update(0, 0.5)
    assert close(model[0].weight.detach(), [[2.9625], [0.0]])
    assert close(model[1].weight.detach(), [[3.95, 0.0]])
    assert close(model[1].bias.detach(), [7.0])


def test_growing_decays_the_marked_channels_more_and_more():
    model, groups = two_layers()
    plan_of = partial(allocation.plan, groups, budget=Budget(params=0.6), criterion="magnitude_l2", scope="layer")
    training = on(model, num_steps=4, lr_sum=0.4)
    policy = Growing(training, graph=groups, strength=0.9, plan_of=plan_of, every=1, settled_after=0.5)
    factors = []
    for step in range(4):
        before = model[0].weight[1].item()
        policy.after_update(step, 0.1)
        factors.append(model[0].weight[1].item() / before)
    # lr 0.1 * decay k for k = 1, 2, 3, no more: 0.9 in total, as strength says
    assert factors == pytest.approx([0.9, 0.8, 0.7, 0.7])
    assert close(model[0].weight[0].detach(), [3.0])  # channel 0 is kept
    assert policy.figures() == {"largest_norm_of_marked": pytest.approx(0.5 * 0.9 * 0.8 * 0.7 * 0.7)}


def test_bn_slimming_touches_the_scales_of_norms_alone():
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    BnSlimming(on(model), graph=graph(), strength=2.0, min_keep=0.0).after_update(0, 0.25)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"1.weight", "4.weight"}
    assert close(model[1].weight.detach(), [0.5] * 16)


def test_scales_of_one_channel_go_to_zero_together():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1, groups=2), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)
    )
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([3.0, 0.3]))
        model[3].weight.copy_(torch.tensor([4.0, 0.4]))
    traced = trace(model.eval(), torch.zeros(1, 1, 4, 4))
    # Norms are 5 and 0.5, 2.75 on average: half of the sum of rates takes 1 from the least and 1/16 from the largest.
    BnSlimming(on(model), graph=traced, strength=2 / 2.75, min_keep=0.0).after_update(0, 0.5)
    assert close(model[1].weight.detach(), [2.9625, 0.0])
    assert close(model[3].weight.detach(), [3.95, 0.0])


def test_a_network_without_norms_cannot_be_slimmed():
    model, groups = two_layers()
    with pytest.raises(ValueError, match="no group passes through a norm"):
        BnSlimming(on(model), graph=groups, strength=1.0)


def test_a_penalty_that_has_met_its_aim_holds_its_zeros_against_momentum_and_leaves_the_others():
    model = Line([0.5, -0.25, 0.05])
    training = on(model, momentum=0.9)
    policy = L1Prox(training, names=["weight"], strength=0.75, keep=0.7)
    for step in range(3):
        model.weight.grad = torch.tensor([[0.0, 0.0, -0.1]]) * (
            step == 0
        )  # lr 0.1: moves the last by 0.01, 0.009, 0.0081
        training.optimizer.step()
        policy.after_update(step, 0.5)
    # The first update leaves 0.06, which the penalty of 0.1 takes away; with 2 of 3 left it rests.
    assert policy.rests
    assert close(model.weight[0].detach(), [0.4, -0.15, 0.0])
    assert model.weight[0, 2] == 0
    assert policy.shared()["weight"].tolist() == [[True, True, False]]


def test_a_penalty_beside_masks_leaves_the_aim_to_them():
    options = {"graph": graph(), "names": WEIGHTS, "pattern": "unstructured", "keep": 0.5}
    alone, *_ = policies(["l1_prox"], [], Aim(**options))
    beside, _ = policies(["l1_prox", "rigl"], [], Aim(**options))
    assert (alone.keywords["keep"], beside.keywords["keep"]) == (0.5, 0.0)


# --- they reach their aim ---------------------------------------------------------------------------------------------


def zero_channels(state: dict[str, torch.Tensor]) -> list[int]:
    return [int((state[name].flatten(1).abs().sum(1) == 0).sum()) for name in WEIGHTS]


def test_l1_prox_reaches_its_share_of_exact_zeros_and_rests_there():
    result = trained([partial(L1Prox, names=WEIGHTS, strength=3.0, keep=0.5)])
    state = result.state_dict
    zeros = sum(int((state[n] == 0).sum()) for n in WEIGHTS) / sum(state[n].numel() for n in WEIGHTS)
    assert 0.5 <= zeros < 0.55
    assert accuracy(state) > CHANCE + 0.5
    last = result.history[-1]
    assert last["layers"]["0.weight"][0] <= last["layers"]["0.weight"][1]
    assert last["zeros"] > result.history[0]["zeros"]


def test_l1_sign_leaves_small_weights_and_no_zeros():
    state = trained([partial(L1Sign, names=WEIGHTS, strength=2.0)]).state_dict
    plain = trained([]).state_dict
    assert not any(bool((state[name] == 0).any()) for name in WEIGHTS)
    assert all(state[name].abs().mean() < 0.7 * plain[name].abs().mean() for name in WEIGHTS)
    assert accuracy(state) > CHANCE + 0.5


def test_channels_that_the_group_lasso_has_emptied_can_be_cut_without_a_trace():
    state = trained([partial(GroupLasso, graph=graph(), strength=8.0, fraction=0.5)]).state_dict
    model = network()
    model.load_state_dict(state)
    saliency = magnitude_l2(graph(), {}, state, 0)
    left = remaining_cost(graph(), "params")({name: (score_C > 0).float() for name, score_C in saliency.items()})
    assert 0.4 < float(left) <= 0.5
    empty = {name: {*(score_C == 0).nonzero()[:, 0].tolist()} for name, score_C in saliency.items()}
    plan = allocation.plan(graph(), saliency, Budget(params=0.5), criterion="magnitude_l2", scope="flat")
    assert all(
        {*group.removed} <= empty[group.name] for group in plan.groups
    )  # the budget is reached by the empty ones
    images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    assert verify(cut(model.eval(), plan), model, images).max_rel < 1e-5
    assert accuracy(state) > CHANCE + 0.5


def test_bn_slimming_brings_scales_to_zero_until_the_budget_is_met():
    result = trained([partial(BnSlimming, graph=graph(), strength=8.0, fraction=0.5)])
    scales = {name: result.state_dict[f"{norm}.weight"] for name, norm in (("0", 1), ("3", 4))}
    left = remaining_cost(graph(), "params")({name: (scale != 0).float() for name, scale in scales.items()})
    assert 0.3 < float(left) <= 0.55
    assert result.history[-1]["remains"] == pytest.approx(float(left))
    assert accuracy(result.state_dict) > CHANCE + 0.5


def test_growing_empties_exactly_what_the_budget_removes():
    plan_of = partial(allocation.plan, graph(), budget=Budget(params=0.4), criterion="magnitude_l2", scope="layer")
    policy = partial(Growing, graph=graph(), strength=20.0, plan_of=plan_of, every=5, settled_after=0.75)
    result = trained([policy])
    assert result.history[-1]["largest_norm_of_marked"] < 1e-3
    kept = plan_of(magnitude_l2(graph(), {}, result.state_dict, 0))
    model = network()
    model.load_state_dict(result.state_dict)
    small = cut(model.eval(), kept)
    images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    assert verify(small, model, images).max_rel < 1e-2  # nothing is lost by the cut
    assert accuracy(result.state_dict) > CHANCE + 0.5


@pytest.mark.parametrize("kind", ["l1_prox", "group_lasso", "bn_slimming"])
def test_a_penalty_that_rests_does_so_after_a_resume_too(tmp_path, kind):
    policy = {
        "l1_prox": partial(L1Prox, names=WEIGHTS, strength=3.0, keep=0.5),
        "group_lasso": partial(GroupLasso, graph=graph(), strength=8.0, fraction=0.5),
        "bn_slimming": partial(BnSlimming, graph=graph(), strength=8.0, fraction=0.5),
    }[kind]
    whole = trained([policy], directory=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained([policy], batches=Batches(dies_at=56), directory=tmp_path / "cut")
    resumed = trained([policy], directory=tmp_path / "cut")
    assert resumed.resumed_from == 50
    assert same_tensors(whole.state_dict, resumed.state_dict)
