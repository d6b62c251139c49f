"""Removing residual blocks: trials decide which may go, the cut equals the reference, a plan carries them, the budget is met."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.models.costs import count
from pipeline.models.graph import Graph
from pipeline.models.standalone import Removed
from pipeline.pruning.allocation import plan
from pipeline.pruning.masks import channel_masks
from pipeline.pruning.plan import Budget, Plan, planned
from pipeline.pruning.reference import mask
from pipeline.pruning.stability import plan_change
from pipeline.pruning.surgery import PlanMismatch, cut
from pipeline.pruning.trials import random_blocks, random_subsets, trace
from pipeline.pruning.verify import verify
from tests.graphs import chain
from tests.residual import IMAGE, OPTIONAL, Basic, Network, Scaled, Watched, resnet, rough

TWO_ROWS = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
INSIDE = "blocks.0.conv1"


@cache
def graph() -> Graph:
    return trace(resnet(), IMAGE, blocks=True)


def names(graph: Graph) -> list[str]:
    return [block.name for block in graph.blocks]


# --- trials ---------------------------------------------------------------------------------------------------------


def test_blocks_that_pass_their_trials_can_go_and_nothing_else_changes():
    assert names(graph()) == OPTIONAL
    assert replace(graph(), blocks=()) == trace(resnet(), IMAGE)


def test_a_block_whose_activation_changes_what_goes_in_stays_with_the_reason():
    mixed = trace(rough(Network(Basic(8, 8), Basic(8, 8), positive=False)), IMAGE, blocks=True)
    assert names(mixed) == ["blocks.1"]
    (frozen,) = (frozen for frozen in mixed.frozen if frozen.group.startswith("block:"))
    assert (frozen.group, frozen.operation) == ("block:blocks.0", "trial cut")
    assert "differs from the masked one" in frozen.reason


def test_a_block_whose_branch_is_used_elsewhere_stays_with_the_reason():
    watched = trace(rough(Network(Basic(8, 8), Watched(8, 8))), IMAGE, blocks=True)
    assert names(watched) == ["blocks.0"]
    (frozen,) = (frozen for frozen in watched.frozen if frozen.group == "block:blocks.1")
    assert frozen.reason.startswith("the cut network")


def test_without_blocks_in_a_network_there_are_none():
    assert trace(rough(Network(Basic(8, 16), width=16)), IMAGE, blocks=True).blocks == ()


def test_random_blocks_are_a_half_in_running_order():
    drawn = [random_blocks(graph().blocks, seed=0, trial=t) for t in range(8)]
    assert all(len(some) == 2 and some == sorted(some, key=graph().blocks.index) for some in drawn)
    assert len({tuple(some) for some in drawn}) > 1


# --- the cut ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [["blocks.0"], ["blocks.2", "blocks.3"], OPTIONAL])
@pytest.mark.parametrize("channels", [False, True])
def test_a_cut_network_equals_the_masked_one_and_costs_what_the_plan_says(removed, channels):
    model = resnet()
    chosen = planned(graph(), random_subsets(graph(), seed=3) if channels else {}, removed_blocks=removed)
    small = cut(model, chosen)
    assert verify(small, mask(model, chosen), TWO_ROWS).require(1e-5).rows == 2
    assert sum(p.numel() for p in small.parameters()) == chosen.kept.params
    assert [name for name, module in small.named_modules() if isinstance(module, Removed)] == removed
    assert not any(name.startswith(f"{block}.") for name in small.state_dict() for block in removed)
    assert all(not isinstance(module, Removed) for module in model.modules())


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "mobilenetv2_035"])
def test_networks_of_timm_without_half_of_their_blocks(name):
    model = timm.create_model(name, num_classes=4).eval()
    size = 160 if name == "test_vit" else 32
    found = trace(model, torch.zeros(1, 3, size, size), blocks=True)
    assert len(found.blocks) >= 2
    halved = planned(found, random_subsets(found, seed=1), removed_blocks=names(found)[::2])
    verify(cut(model, halved), mask(model, halved), torch.rand(2, 3, size, size)).require()


def test_a_layer_scaled_block_in_the_middle_goes():
    model = rough(Network(Scaled(8), Scaled(8), Scaled(8)))
    found = trace(model, IMAGE, blocks=True)
    middle = planned(found, {}, removed_blocks=["blocks.1"])
    expected = model.head(model.blocks[2](model.blocks[0](model.stem(TWO_ROWS).relu())).mean((2, 3)))
    assert torch.equal(cut(model, middle)(TWO_ROWS), expected)


class Calling(nn.Module):
    """Its forward asks its block for a size, which a removed one cannot tell."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Network(Basic(8, 8), Basic(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        assert self.net.blocks[1].conv1.kernel_size == (3, 3)
        return self.net(x)


def test_a_block_whose_parts_are_asked_for_by_others_stays_with_the_error():
    found = trace(rough(Calling()), IMAGE, blocks=True)
    assert names(found) == ["net.blocks.0"]
    assert any("AttributeError" in frozen.reason for frozen in found.frozen)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_a_plan_with_removed_blocks_survives_its_json():
    chosen = planned(graph(), {"stem": [0, 3]}, removed_blocks=["blocks.0"], budget=Budget(params=0.5))
    again = Plan.from_json(chosen.to_json())
    assert again == chosen
    assert again.to_json() == chosen.to_json()
    assert again.sha256() != planned(graph(), {"stem": [0, 3]}).sha256()
    assert "removed_blocks" not in planned(graph(), {}).to_json()


def test_a_group_inside_of_a_removed_block_keeps_nothing():
    chosen = planned(graph(), {INSIDE: [1, 2]}, removed_blocks=["blocks.0"])
    assert chosen.group(INSIDE).kept == ()
    assert not channel_masks(chosen)[INSIDE].any()
    assert chosen.kept == count(graph(), {}, ["blocks.0"])
    assert not any(name.startswith("blocks.0.") for name in chosen.slices())
    with pytest.raises(ValueError, match=f"group {INSIDE}: plan keeps 0 of 8 channels"):
        replace(chosen, blocks=())


def test_a_plan_says_which_blocks_differ():
    first, second = (planned(graph(), {}, removed_blocks=[name]) for name in ("blocks.2", "blocks.3"))
    lines = first.diff(second)
    assert {"block blocks.2: is kept", "block blocks.3: is removed"} <= set(lines)
    assert plan_change(first, second) == 1.0
    assert plan_change(first, first) == 0.0


def test_a_plan_does_not_fit_a_network_that_lacks_the_block():
    chosen = planned(graph(), {}, removed_blocks=["blocks.0"])
    with pytest.raises(PlanMismatch, match=r"blocks\.0\.bn1\.bias .* is not in the model"):
        cut(cut(resnet(), chosen), chosen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(removed_blocks="x"), "plan.removed_blocks"),
        (lambda d: d.update(removed_blocks=[["blocks.0"]]), r"plan.removed_blocks\[0\]"),
        (lambda d: d["removed_blocks"][0][1].append("nothing.weight"), "nothing.weight of a removed block"),
        (lambda d: d["removed_blocks"].append(d["removed_blocks"][0]), "block:blocks.0 occurs twice"),
        (lambda d: d["removed_blocks"][0][2].pop(), "were edited"),
    ],
)
def test_what_is_broken_in_a_plans_blocks_is_named(change, message):
    document = json.loads(planned(graph(), {}, removed_blocks=["blocks.0"]).to_json())
    change(document)
    with pytest.raises(ValueError, match=message):
        Plan.from_json(json.dumps(document))


# --- allocation -------------------------------------------------------------------------------------------------------


def saliency(channel: float, **blocks: float) -> dict[str, Tensor]:
    """The same for every channel; of block i as given by `b<i>`."""
    found = {group.name: torch.full((group.size,), channel).double() for group in graph().groups}
    return found | {f"block:blocks.{name[1:]}": torch.tensor([value]).double() for name, value in blocks.items()}


@pytest.mark.parametrize("scope", ["global", "layer", "flat", "isomorphic"])
def test_the_least_salient_block_goes_and_no_more_than_may(scope):
    values = saliency(1000.0, b0=9.0, b2=2.0, b3=1.0)
    budget = Budget(params=0.35)  # blocks 2 and 3 are 32 % of the parameters each
    one = plan(graph(), values, budget, scope=scope, max_blocks=0.34)
    assert [block.name for block in one.blocks] == ["blocks.3"]
    two = plan(graph(), values, budget, scope=scope, max_blocks=0.67)
    assert [block.name for block in two.blocks] == ["blocks.2", "blocks.3"]
    for chosen in (one, two):
        assert chosen.kept.params <= 0.35 * chosen.dense.params


def test_a_second_cut_counts_the_blocks_of_the_first():
    first = plan(graph(), saliency(1000.0, b0=9.0, b2=2.0, b3=1.0), Budget(params=0.65), max_blocks=0.34)
    small = cut(resnet(), first)
    left = trace(small, IMAGE, blocks=True)
    assert (names_of(first), names(left)) == (["blocks.3"], ["blocks.0", "blocks.2"])
    values = {name: torch.ones(size) for name, size in left.scored().items()} | {"block:blocks.0": torch.tensor([1e6])}
    for most, gone in ((0.34, []), (0.67, ["blocks.2"])):
        second = plan(left, values, Budget(params=0.25), max_blocks=most, dense=graph())
        assert names_of(second) == gone
        assert second.dense == first.dense
        assert second.kept.params <= 0.25 * first.dense.params
        assert verify(cut(small, second), mask(small, second), TWO_ROWS).require()


def test_in_the_global_scope_a_block_competes_with_channels_by_saliency_per_cost():
    budget = Budget(params=0.65)
    cheap = plan(graph(), saliency(1.0, b0=1e6, b2=1e6, b3=1.0), budget, max_blocks=1)
    dear = plan(graph(), saliency(1.0, b0=1e6, b2=1e6, b3=1e6), budget, max_blocks=1)
    assert ([b.name for b in cheap.blocks], [b.name for b in dear.blocks]) == (["blocks.3"], [])


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_block_that_saves_more_than_is_asked_for_stays_unless_channels_do_not_suffice(scope):
    values = saliency(1.0, b0=0.0, b2=0.0, b3=0.0)
    one = plan(graph(), values, Budget(params=0.9), scope=scope, max_blocks=1)
    assert names_of(one) == ["blocks.0"]  # 8 %, the others 32 % each
    assert (
        0.85 * one.dense.params < one.kept.params <= 0.9 * one.dense.params
    )  # the last channel was one of the wide stream
    whole = {group.name: torch.full((group.size,), float("inf")) for group in graph().groups}
    forced = plan(graph(), values | whole, Budget(params=0.9), scope=scope, max_blocks=1)
    assert names_of(forced) in (["blocks.2"], ["blocks.0", "blocks.2"])


def test_no_block_goes_unless_it_may():
    values = saliency(1.0, b0=0.0, b2=0.0, b3=0.0)
    chosen = plan(graph(), values, Budget(params=0.5))
    assert chosen.blocks == ()
    without = {name: score for name, score in values.items() if not name.startswith("block:")}
    assert plan(graph(), without, Budget(params=0.5)) == chosen
    assert plan(replace(graph(), blocks=()), without, Budget(params=0.5)).sha256() == chosen.sha256()


@pytest.mark.parametrize("scope", ["global", "flat", "layer", "isomorphic"])
def test_a_network_of_blocks_alone_is_planned(scope):
    only = replace(graph(), groups=())
    values = {block.key: torch.ones(1) for block in only.blocks}
    chosen = plan(only, values, Budget(params=0.7), scope=scope, max_blocks=1)
    assert len(chosen.blocks) >= 1
    assert chosen.kept.params <= 0.7 * chosen.dense.params


def test_a_block_of_infinite_saliency_stays():
    values = saliency(1.0, b0=float("inf"), b2=float("inf"), b3=float("inf"))
    for scope in ("global", "layer"):
        assert plan(graph(), values, Budget(params=0.5), scope=scope, max_blocks=1).blocks == ()


def test_blocks_without_saliency_are_named():
    values = saliency(1.0, b0=1.0, b2=1.0)
    with pytest.raises(ValueError, match=r"saliency lacks group block:blocks\.3"):
        plan(graph(), values, Budget(params=0.5), max_blocks=0.5)
    with pytest.raises(ValueError, match=r"saliency of group block:blocks\.3 is nan"):
        plan(graph(), saliency(1.0, b0=1.0, b2=1.0, b3=float("nan")), Budget(params=0.5), max_blocks=0.5)
    with pytest.raises(ValueError, match="max_blocks"):
        plan(chain(3, 4, 2), {"fc0": torch.ones(4)}, Budget(params=0.5), max_blocks=1.5)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_blocks_reach_budgets_that_channels_cannot_and_say_where_it_ends(scope):
    values = saliency(1.0, b0=1.0, b2=1.0, b3=1.0)
    with pytest.raises(ValueError, match=r"raise max_blocks"):
        plan(graph(), values, Budget(params=0.2), scope=scope, min_keep=0.5)
    reached = plan(graph(), values, Budget(params=0.2), scope=scope, min_keep=0.5, max_blocks=1)
    assert reached.kept.params <= 0.2 * reached.dense.params
    with pytest.raises(ValueError, match="the smallest reachable fraction") as error:
        plan(graph(), values, Budget(params=0.01), scope=scope, min_keep=0.5, max_blocks=1)
    assert "max_blocks" not in str(error.value)


@given(
    st.lists(st.floats(0, 10), min_size=3, max_size=3),
    st.integers(0, 1000),
    st.floats(0.25, 0.95),
    st.sampled_from(["params", "macs"]),
    st.sampled_from(["global", "layer", "flat", "isomorphic"]),
    st.sampled_from([0.0, 0.4, 1.0]),
)
def test_the_budget_is_met_and_no_removed_block_fits_in_between(blocks, seed, fraction, measure, scope, most):
    generator = torch.Generator().manual_seed(seed)
    values = {group.name: torch.rand(group.size, generator=generator).double() for group in graph().groups}
    values |= {block.key: torch.tensor([value]).double() for block, value in zip(graph().blocks, blocks, strict=True)}
    chosen = plan(graph(), values, Budget(**{measure: fraction}), scope=scope, max_blocks=most)
    target, gone = fraction * chosen.dense[measure], names_of(chosen)
    assert chosen.kept[measure] <= target
    assert len(gone) <= most * 3
    kept = {group.name: torch.tensor(group.kept) for group in chosen.groups if group.kept}
    for block in gone:  # back, with all channels that lie inside of it
        assert count(graph(), kept, [name for name in gone if name != block])[measure] > target


def names_of(chosen: Plan) -> list[str]:
    return [block.name for block in chosen.blocks]
