from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from pipeline.models.costs import count
from pipeline.pruning import allocation
from pipeline.pruning.plan import Budget
from pipeline.pruning.surgery import cut
from pipeline.pruning.verify import verify
from pipeline.saliency import criteria
from pipeline.training import gates
from pipeline.training.entries import remaining_cost
from pipeline.training.gates import channel_gates, probability_open, sampled, weight_gates, without_noise
from pipeline.training.step import mixed_seed
from tests.graphs import chain
from tests.training.sparse import CLASSES, WEIGHTS, Batches, Line, accuracy, graph, network, on, trained
from tests.training.toy import same_tensors

CHANCE = 1 / CLASSES
ALPHA = torch.tensor([0.0, 2.0, -4.0])


# --- three gates by hand ----------------------------------------------------------------------------------------------


def test_a_sample_is_the_stretched_and_clipped_concrete():
    # u = 1/2 makes the noise 0: s = sigmoid(alpha / (2/3)) = 0.5, 0.952574, 0.002473; z = clip(1.2 s - 0.1).
    z = sampled(ALPHA, torch.full((3,), 0.5))
    assert torch.allclose(z, torch.tensor([0.5, 1.0, 0.0]), atol=1e-6)
    u = torch.tensor([0.75])  # ln 3 = 1.0986: s = sigmoid(1.5 * 1.0986) = 0.838610
    assert torch.allclose(sampled(torch.zeros(1), u), torch.tensor([1.2 * 0.838610 - 0.1]), atol=1e-5)


def test_the_gate_after_training_has_no_noise():
    expected = [1.2 / (1 + math.exp(-a)) - 0.1 for a in (0.0, 2.0)]
    assert torch.allclose(without_noise(ALPHA), torch.tensor([*expected, 0.0]), atol=1e-6)


def test_the_probability_of_an_open_gate_is_the_penalty_of_louizos():
    shift = -2 / 3 * math.log(0.1 / 1.1)  # 1.5986
    expected = [1 / (1 + math.exp(-(a + shift))) for a in (0.0, 2.0, -4.0)]
    assert torch.allclose(probability_open(ALPHA), torch.tensor(expected), atol=1e-6)


def test_samples_are_zero_and_one_as_often_as_the_formula_says():
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    z = sampled(torch.full_like(uniform, 0.3), uniform)
    assert float((z > 0).double().mean()) == pytest.approx(float(probability_open(torch.tensor(0.3))), abs=0.005)
    assert 0 < float((z == 1).double().mean()) < 1


# --- gates as factors of weights --------------------------------------------------------------------------------------


def test_gradients_of_a_gated_weight_are_those_of_autograd():
    model = Line([1.0, 2.0, 3.0])
    policy = weight_gates(on(model), names=["weight"], budget=0.5, lr=0.1, settled_after=1.0)
    x = torch.tensor([[1.0, -1.0, 2.0]])
    policy.before_forward(0)
    z = policy.factors["weight"].detach().clone()
    assert torch.allclose(model.weight.detach(), z * torch.tensor([[1.0, 2.0, 3.0]]))
    model(x).square().sum().backward()
    alphas = policy.alphas["weight"].detach().clone()
    # The same by autograd, with the gates inside the loss and no penalty.
    weight, alpha = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True), alphas.clone().requires_grad_()
    generator = torch.Generator().manual_seed(mixed_seed(0, 0))
    uniform = torch.rand(alpha.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    (x @ (weight * sampled(alpha, uniform)).t()).square().sum().backward()
    policy._steer_ = lambda aim: None  # type: ignore[method-assign]
    policy.after_backward(0)
    assert torch.allclose(model.weight.grad, weight.grad)
    assert torch.allclose(policy.alphas["weight"].grad, alpha.grad)
    assert torch.equal(model.weight.detach(), torch.tensor([[1.0, 2.0, 3.0]]))


def test_a_closed_gate_of_a_channel_is_the_channel_cut_off_for_all_its_readers():
    model = nn.Sequential()
    model.add_module("fc0", nn.Linear(2, 3))
    model.add_module("fc1", nn.Linear(3, 2))
    policy = channel_gates(on(model), graph=chain(2, 3, 2), measure="params", budget=0.5, lr=0.1, settled_after=1.0)
    with torch.no_grad():
        policy.alphas["fc0"].copy_(torch.tensor([9.0, -9.0, 9.0]))
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    hidden = model[0](x) * torch.tensor([1.0, 0.0, 1.0])
    expected = model[1](hidden)
    policy.settle_(model)
    assert torch.allclose(model(x), expected, atol=1e-6)
    assert bool((model[1].weight[:, 1] == 0).all())


@pytest.mark.parametrize("measure", ["params", "macs"])
def test_the_expected_cost_of_certain_gates_is_the_exact_cost(measure):
    kept = {"0": [0, 3, 5], "3": [1, 2]}
    certain = {name: torch.zeros(16).index_fill(0, torch.tensor(channels), 1.0) for name, channels in kept.items()}
    exact = count(graph(), {name: torch.tensor(channels) for name, channels in kept.items()})
    dense = count(graph(), {})
    assert float(remaining_cost(graph(), measure)(certain)) == pytest.approx(exact[measure] / dense[measure], rel=1e-12)


# --- they reach their aim ---------------------------------------------------------------------------------------------


def test_gates_of_channels_reach_the_budget_and_their_channels_can_be_cut():
    policy = partial(channel_gates, graph=graph(), measure="params", budget=0.5, lr=0.2, settled_after=0.7)
    result = trained([policy], epochs=12)
    assert result.history[-1]["expected_to_remain"] == pytest.approx(0.5, abs=0.01)
    rule = criteria.rule("channels", "hard_concrete")
    saliency = rule.fn(graph(), result.statistics, result.state_dict, 0)
    plan = allocation.plan(graph(), saliency, Budget(params=0.55), criterion=rule.name, scope=rule.scope)
    model = network()
    model.load_state_dict(result.state_dict)
    images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    assert verify(cut(model.eval(), plan), model, images).max_rel < 0.1  # what is cut gave next to nothing
    assert accuracy(result.state_dict) > CHANCE + 0.5


def test_gates_of_weights_leave_exact_zeros_in_the_result():
    policy = partial(weight_gates, names=WEIGHTS, budget=0.4, lr=0.2, settled_after=0.7)
    result = trained([policy], epochs=12)
    state = result.state_dict
    zeros = sum(int((state[n] == 0).sum()) for n in WEIGHTS) / sum(state[n].numel() for n in WEIGHTS)
    assert zeros == pytest.approx(0.6, abs=0.05)
    assert accuracy(state) > CHANCE + 0.5
    score = criteria.rule("weights", "hard_concrete").fn("0.weight", result.statistics, state, 0)
    assert bool((score[state["0.weight"] == 0] < score[state["0.weight"] != 0].max()).all())


@pytest.mark.parametrize("gated", ["channels", "weights"])
def test_a_resumed_training_with_gates_equals_the_undisturbed_one(tmp_path, gated):
    policy = {
        "channels": partial(channel_gates, graph=graph(), measure="macs", budget=0.5, lr=0.2, settled_after=0.7),
        "weights": partial(weight_gates, names=WEIGHTS, budget=0.4, lr=0.2, settled_after=0.7),
    }[gated]
    whole = trained([policy], directory=tmp_path / "whole", epochs=3)
    with pytest.raises(KeyboardInterrupt):
        trained([policy], batches=Batches(dies_at=17), directory=tmp_path / "cut", epochs=3)
    resumed = trained([policy], directory=tmp_path / "cut", epochs=3)
    assert resumed.resumed_from == 10
    assert same_tensors(whole.state_dict, resumed.state_dict)
    assert same_tensors(whole.statistics, resumed.statistics)


def test_the_most_open_gates_of_each_group_stay_open():
    policy = channel_gates(
        on(network()), graph=graph(), measure="params", budget=0.1, lr=0.1, settled_after=1.0, min_keep=0.25
    )
    with torch.no_grad():
        policy.alphas["0"].copy_(-torch.arange(1.0, 17.0))
    policy._hold_open_()
    assert policy.alphas["0"].tolist() == [2.0] * 4 + [-float(c) for c in range(5, 17)]


def test_a_network_without_groups_has_nothing_to_gate():
    with pytest.raises(ValueError, match="nothing to gate"):
        channel_gates(on(Line([1.0])), graph=chain(2, 3), measure="params", budget=0.5, lr=0.1, settled_after=1.0)


def test_the_constants_are_those_of_the_paper():
    assert (gates.BETA, gates.GAMMA, gates.ZETA) == (2 / 3, -0.1, 1.1)
