"""Residual blocks: which modules hand on their input with something added, and what they cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

from pipeline.models.costs import Costs, count
from pipeline.models.graph import Block, Branch, Frozen, Graph
from pipeline.models.standalone import Removed
from pipeline.models.trace import find_blocks, propagate
from tests.graphs import chain
from tests.residual import IMAGE, OPTIONAL, Network, Scaled, resnet, rough

TWO_ROWS = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def found(model: nn.Module, images: Tensor = TWO_ROWS) -> dict[str, list[tuple[str, tuple[int, int]]]]:
    return {b.name: [(branch.module, branch.call[:2]) for branch in b.branches] for b in find_blocks(model, (images,))}


def test_a_resnets_blocks_without_projection_are_found_behind_their_activation():
    # of a block's own two calls, bn1(...).relu() is number 0 and the sum number 1, whose first argument is the branch
    assert found(resnet()) == {name: [(name, (1, 0))] for name in OPTIONAL}


def test_a_blocks_tensors_are_its_parameters_and_buffers():
    block = find_blocks(resnet(), (TWO_ROWS,))[0]
    assert set(block.tensors) == {name for name in resnet().state_dict() if name.startswith("blocks.0.")}


def test_layer_scale_and_dropout_belong_to_the_branch():
    assert list(found(rough(Network(Scaled(8), Scaled(8))))) == ["blocks.0", "blocks.1"]


def test_a_transformers_block_has_two_branches():
    vit = timm.create_model("test_vit", num_classes=4).eval()
    blocks = found(vit, torch.rand(2, 3, 160, 160))
    assert list(blocks) == [f"blocks.{i}" for i in range(6)]
    assert blocks["blocks.2"] == [("blocks.2", (0, 1)), ("blocks.2", (1, 1))]


def test_inverted_residuals_of_one_width_are_found():
    names = list(found(timm.create_model("mobilenetv2_035").eval(), torch.rand(2, 3, 32, 32)))
    assert names == [f"blocks.{i}" for i in ("1.1", "2.1", "2.2", "3.1", "3.2", "3.3", "4.1", "4.2", "5.1", "5.2")]


class Branched(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x)


def conv() -> nn.Module:
    return nn.Conv2d(8, 8, 1)


def test_of_nested_blocks_the_innermost_is_found():
    assert list(found(Network(nn.Sequential(Branched(conv()), Branched(conv()))))) == ["blocks.0.0", "blocks.0.1"]


class Position(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1, 8, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


class Twice(Branched):
    """2 x + branch."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.inside(x)) + x


class Less(Branched):
    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) - x


@pytest.mark.parametrize(
    "block",
    [Position(), Twice(conv()), Less(conv()), nn.Sequential(conv()), Branched(nn.Tanh())],
    ids=lambda b: str(b)[:9],
)
def test_what_is_no_sum_of_the_input_and_a_branch_with_parameters_is_no_block(block):
    assert found(Network(block)) == {}


def test_a_module_that_runs_twice_is_no_block_and_those_that_share_weights_are_one():
    block = Branched(conv())
    assert found(Network(block, block)) == {}
    one, other = Branched(conv()), Branched(conv())
    other.inside.weight = one.inside.weight
    assert list(found(Network(one, other))) == ["blocks"]


def test_looking_for_blocks_leaves_the_network_as_it_is():
    model = resnet().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_blocks(model, (TWO_ROWS,))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_removed_hands_on_its_first_argument():
    assert Removed()(IMAGE, None, mask=IMAGE) is IMAGE
    assert len(list(Removed().parameters())) == 0


# --- costs ----------------------------------------------------------------------------------------------------------


def graph() -> Graph:
    model = resnet()
    return replace(propagate(model, IMAGE), blocks=find_blocks(model, (TWO_ROWS,)))


def test_the_tensors_of_a_removed_block_cost_nothing():
    dense = count(graph(), {})
    # two convolutions of 8 x 8 x 3 x 3 on 4 x 4 positions, two norms with scale and shift
    assert count(graph(), {}, ["blocks.0"]) == Costs(dense.params - 2 * 576 - 4 * 8, dense.macs - 2 * 576 * 16)
    inside = {"blocks.0.conv1": torch.tensor([3])}
    assert count(graph(), inside, ["blocks.0"]) == count(graph(), {}, ["blocks.0"])
    both = count(graph(), {}, ["blocks.2", "blocks.3"])
    assert both == Costs(dense.params - 2 * (2 * 2304 + 4 * 16), dense.macs - 2 * 2 * 2304 * 16)


def test_channels_that_go_through_a_removed_block_cost_less_elsewhere():
    three = {"stem": torch.tensor([0, 1, 2])}
    kept = count(graph(), three).params - count(graph(), three, ["blocks.0"]).params
    assert kept == 2 * 3 * 8 * 9 + 2 * 8 + 2 * 3  # conv1 reads 3 and conv2 writes 3


def test_an_unknown_block_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no optional block 'blocks.1'.*known blocks: blocks.0, blocks.2, blocks.3"):
        count(graph(), {}, ["blocks.1"])
    with pytest.raises(ValueError, match="trace with blocks=True"):
        chain(3, 4, 2).block("fc0")


# --- as data --------------------------------------------------------------------------------------------------------


def test_a_graph_with_blocks_survives_its_json_and_one_without_has_the_hash_that_it_had():
    assert Graph.from_json(graph().to_json()) == graph()
    assert '"blocks"' not in replace(graph(), blocks=()).to_json()
    assert graph().sha256() != replace(graph(), blocks=()).sha256()


def test_a_block_is_scored_beside_the_groups_under_a_name_of_its_own():
    small = replace(chain(3, 4, 2), blocks=(Block("fc0", ("fc0.weight",), (Branch("fc0", (0, 1, "add")),)),))
    assert small.scored() == {"fc0": 4, "block:fc0": 1}
    assert list(small.gates().values()) == [small.groups[0].consumers, small.blocks[0].branches]


def test_a_block_is_frozen_like_a_group():
    why = Frozen("block:blocks.2", 1, "me", "here", "it stays")
    left = graph().without({"block:blocks.2": why})
    assert [block.name for block in left.blocks] == ["blocks.0", "blocks.3"]
    assert left.frozen[-1] == why
    assert left.groups == graph().groups


def test_a_parameter_that_is_added_to_a_single_row_is_no_branch():
    assert found(Network(Position()), IMAGE) == {}
