from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch

from pipeline.models.graph import Graph
from pipeline.pruning import allocation
from pipeline.pruning.plan import Budget
from pipeline.pruning.surgery import cut
from pipeline.pruning.verify import verify
from pipeline.saliency.channel_rules import magnitude_l2
from pipeline.training.dynamic import (
    Cubic,
    Decisions,
    DynamicPruningWithFeedback,
    Masked,
    RigL,
    SoftFilter,
    moved,
    silence_,
)
from pipeline.training.policy import Policies
from tests.training.sparse import CLASSES, WEIGHTS, Batches, Line, accuracy, graph, network, on, trained
from tests.training.toy import same_tensors

CHANCE = 1 / CLASSES
OPTIONS = {
    "names": WEIGHTS,
    "pattern": "unstructured",
    "keep": 0.25,
    "scope": "global",
    "every": 5,
    "settled_after": 0.7,
}


# --- three weights by hand --------------------------------------------------------------------------------------------


def test_masks_cover_weight_gradient_and_momentum():
    model = Line([1.0, 2.0, 3.0])
    training = on(model, momentum=0.9, weight_decay=0.1)
    policy = Masked(training, masks={"weight": torch.tensor([[True, False, True]])})
    assert model.weight[0].tolist() == [1, 0, 3]
    for step in range(3):
        model(torch.ones(1, 3)).sum().backward()
        policy.after_backward(step)
        assert model.weight.grad[0].tolist() == [1, 0, 1]
        training.optimizer.step()
        policy.after_update(step, 0.1)
        training.optimizer.zero_grad()
    policy.require_zeros()
    assert model.weight[0, 1] == 0
    assert training.optimizer.state[model.weight]["momentum_buffer"][0, 1] == 0


def test_a_broken_zero_is_not_stored():
    model = Line([1.0, 2.0, 3.0])
    policy = Masked(on(model), masks={"weight": torch.tensor([[True, False, True]])})
    model.weight.data[0, 1] = 1e-9
    with pytest.raises(AssertionError, match="weight is not zero"):
        policy.require_zeros()


def test_masks_of_another_network_are_refused():
    with pytest.raises(ValueError, match=r"conv\.weight"):
        Masked(on(Line([1.0])), masks={"conv.weight": torch.ones(1, dtype=torch.bool)})


def test_the_cubic_schedule_by_hand():
    policy = Cubic(
        on(Line([1.0, 2.0, 3.0, 4.0]), num_steps=8),
        **{**OPTIONS, "names": ["weight"], "every": 1, "settled_after": 0.5},
    )
    assert [policy.keep_at(t) for t in (0, 1, 2, 3, 4, 7)] == pytest.approx(
        [1.0, 0.25 + 0.75 * 27 / 64, 0.25 + 0.75 / 8, 0.25 + 0.75 / 64, 0.25, 0.25]
    )
    kept = []
    for step in range(4):
        policy.after_update(step, 0.1)
        kept.append(policy.masks()["weight"][0].tolist())
    # 4 weights: keeps floor(4 * 0.566, 0.344, 0.262, 0.25) = 2, 1, 1, 1 of the largest.
    assert kept == [[False, False, True, True], *[[False, False, False, True]] * 3]


def test_decisions_are_made_at_intervals_and_for_the_last_time_at_the_end():
    decisions = Decisions(num_steps=20, every=4, settled_after=0.5)
    assert [t for t in range(21) if decisions.at(t)] == [0, 4, 8, 10]
    assert [decisions.progress(t) for t in (0, 5, 10, 20)] == [0, 0.5, 1, 1]


def test_dpf_takes_the_gradient_at_the_masked_weights_and_updates_the_dense_ones():
    model = Line([1.0, 2.0, 3.0])
    training = on(model)
    options = {**OPTIONS, "names": ["weight"], "keep": 0.7}  # 2 of 3
    policy = DynamicPruningWithFeedback(training, **options)
    policy._masks = policy.by_magnitude(0.7)
    policy.before_forward(0)
    assert model.weight[0].tolist() == [0, 2, 3]
    model(torch.tensor([[1.0, 1.0, 1.0]])).square().sum().backward()  # output 5, gradient 10 for each weight
    policy.after_backward(0)
    assert model.weight[0].tolist() == [1, 2, 3]
    assert model.weight.grad[0].tolist() == [10, 10, 10]  # also of the masked one: it may return
    training.optimizer.step()
    assert model.weight[0].tolist() == pytest.approx([0, 1, 2], abs=1e-6)
    policy.settle_(model)
    assert model.weight[0, 0] == 0


def test_rigl_drops_the_smallest_and_grows_where_the_dense_gradient_is_largest():
    weight = torch.tensor([5.0, 0.1, 3.0, 0.0, 0.0, 0.0])
    mask = torch.tensor([True, True, True, False, False, False])
    grad = torch.tensor([9.0, 0.5, 9.0, 0.2, 4.0, 0.3])
    assert moved(weight, grad, mask, 1 / 3).tolist() == [True, False, True, False, True, False]
    same = torch.tensor([9.0, 7.0, 9.0, 0.2, 4.0, 0.3])  # what was dropped has the largest gradient: it stays
    assert moved(weight, same, mask, 1 / 3).tolist() == mask.tolist()
    assert moved(weight, grad, mask, 0.0).tolist() == mask.tolist()


def test_what_rigl_grows_begins_at_zero():
    model = Line([5.0, 0.1, 3.0, 0.4])
    policy = RigL(on(model, num_steps=9), exchange=0.5, **{**OPTIONS, "names": ["weight"], "keep": 0.5, "every": 1})
    assert model.weight[0].tolist() == [5, 0, 3, 0]
    model.weight.grad = torch.tensor([[0.1, 9.0, 0.2, 0.3]])
    policy.after_backward(1)
    assert policy.masks()["weight"][0].tolist() == [True, True, False, False]
    assert model.weight[0].tolist() == [5, 0, 0, 0]
    assert torch.equal(model.weight.grad, torch.tensor([[0.1, 9.0, 0.0, 0.0]]))


def test_rigl_moves_single_weights_only():
    with pytest.raises(ValueError, match="rigl moves single weights"):
        RigL(on(Line([1.0] * 4)), exchange=0.3, **{**OPTIONS, "names": ["weight"], "pattern": "2:4", "keep": None})


# --- they reach their aim ---------------------------------------------------------------------------------------------


def zeros(state: dict[str, torch.Tensor]) -> int:
    return sum(int((state[name] == 0).sum()) for name in WEIGHTS)


ALL = sum(network().get_parameter(name).numel() for name in WEIGHTS)
KINDS = {
    "cubic": partial(Cubic, **OPTIONS),
    "rigl": partial(RigL, exchange=0.3, **OPTIONS),
    "dpf": partial(DynamicPruningWithFeedback, **OPTIONS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_has_exactly_the_zeros_of_the_budget(kind):
    result = trained([KINDS[kind]])
    assert zeros(result.state_dict) == ALL - int(0.25 * ALL)
    assert result.history[-1]["masked"] == pytest.approx(0.75, abs=1e-3)
    assert accuracy(result.state_dict) > CHANCE + 0.5


@pytest.mark.parametrize("kind", ["cubic", "dpf"])
def test_patterns_hold_exactly(kind):
    options = {**OPTIONS, "names": ("3.weight",), "pattern": "2:4", "keep": None}
    made = {"cubic": Cubic, "dpf": DynamicPruningWithFeedback}[kind]
    state = trained([partial(made, **options)]).state_dict
    assert bool(((state["3.weight"].unflatten(1, (-1, 4)) != 0).sum(2) == 2).all())


def test_weights_that_dpf_masked_return_and_those_of_cubic_do_not():
    def masks_over_time(kind) -> list[torch.Tensor]:
        seen = []

        class Watched(kind):
            def after_update(self, step, lr):
                super().after_update(step, lr)
                if self._masks:
                    seen.append(self._masks["0.weight"].clone())

        trained([partial(Watched, **{**OPTIONS, "scope": "layer"})], lr=0.2)
        return seen

    def returned(seen) -> int:
        return sum(int((after & ~before).sum()) for before, after in pairwise(seen))

    assert returned(masks_over_time(Cubic)) == 0
    assert returned(masks_over_time(DynamicPruningWithFeedback)) > 0


def test_soft_filters_go_part_by_part_and_in_the_end_with_all_that_a_cut_takes():
    plan_of = partial(allocation.plan, graph(), budget=Budget(params=0.4), criterion="magnitude_l2", scope="layer")
    zeroed: list[set[int]] = []

    class Watched(SoftFilter):
        def _kept(self, share):
            kept = super()._kept(share)
            zeroed.append({*(~kept["3"]).nonzero()[:, 0].tolist()})
            return kept

    result = trained([partial(Watched, graph=graph(), plan_of=plan_of, every=5, settled_after=0.7)], lr=0.1)
    assert len(zeroed[0]) < len(zeroed[-1])  # part by part
    state = result.state_dict
    model = network()
    model.load_state_dict(state)
    plan = plan_of(magnitude_l2(graph(), {}, state, 0))
    images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    assert verify(cut(model.eval(), plan), model, images).max_rel < 1e-5
    assert accuracy(state) > CHANCE + 0.5


def test_a_soft_zero_takes_the_scale_of_the_norm_and_what_grows_again_returns():
    model = network()
    plan_of = partial(allocation.plan, graph(), budget=Budget(params=0.4), criterion="magnitude_l2", scope="layer")
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(1, 17))
        model[1].bias.fill_(1.0)
    policy = SoftFilter(on(model, num_steps=100), graph=graph(), plan_of=plan_of, every=10, settled_after=1.0)
    before = model[0].weight.detach().clone()
    policy.after_update(9, 0.1)  # 1 - 0.9^3 = 27 % of what the budget removes
    removed = len(plan_of(policy._plan()[1]).groups[0].removed)
    gone = round(0.271 * removed)
    assert model[1].weight.tolist() == [0.0] * gone + [float(c) for c in range(gone + 1, 17)]
    assert model[1].bias.tolist() == [1.0] * 16
    assert torch.equal(model[0].weight, before)
    with torch.no_grad():
        model[1].weight[0] = 20.0  # as if training had brought it back
    policy.after_update(19, 0.1)
    assert model[1].weight[0] == 20
    assert model[1].weight[gone] == 0


def test_outputs_without_weights_have_no_gradient():
    grad = torch.ones(3, 2)
    silence_(grad, torch.tensor([[True, False], [False, False], [True, True]]))
    assert grad.tolist() == [[1, 1], [0, 0], [1, 1]]
    silence_(None, torch.ones(1, 1, dtype=torch.bool))


@pytest.mark.parametrize("kind", [*KINDS, "soft_filter"])
def test_a_resumed_training_with_changing_masks_equals_the_undisturbed_one(tmp_path, kind):
    plan_of = partial(allocation.plan, graph(), budget=Budget(params=0.4), criterion="magnitude_l2", scope="layer")
    soft = partial(SoftFilter, graph=graph(), plan_of=plan_of, every=5, settled_after=0.7)
    policy = {**KINDS, "soft_filter": soft}[kind]
    whole = trained([policy], directory=tmp_path / "whole", epochs=4)
    with pytest.raises(KeyboardInterrupt):
        trained([policy], batches=Batches(dies_at=26), directory=tmp_path / "cut", epochs=4)
    resumed = trained([policy], directory=tmp_path / "cut", epochs=4)
    assert resumed.resumed_from == 20
    assert same_tensors(whole.state_dict, resumed.state_dict)


def test_policies_act_together_and_give_back_in_reverse():
    groups: Graph = graph()
    dpf = partial(DynamicPruningWithFeedback, **OPTIONS)
    plan_of = partial(allocation.plan, groups, budget=Budget(params=0.6), criterion="magnitude_l2", scope="layer")
    soft = partial(SoftFilter, graph=groups, plan_of=plan_of, every=5, settled_after=0.7)
    state = trained([dpf, soft]).state_dict
    assert zeros(state) >= ALL - int(0.25 * ALL)
    assert Policies([]).masks() == {}
