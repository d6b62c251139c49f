"""Saliency of residual blocks: the first-order change of each row's loss when the branches are taken away."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.graph import Graph
from pipeline.models.trace import find_blocks, propagate
from pipeline.pruning.trials import trace
from pipeline.saliency import criteria
from pipeline.saliency.criteria import CRITERIA
from pipeline.saliency.exact import ExactSums, Grid, magnitudes
from pipeline.saliency.score import score
from pipeline.saliency.statistics import GateStatistics, accumulate, by_group, gate_terms
from pipeline.saliency.weight_rules import uniform
from tests.residual import IMAGE, OPTIONAL, Network, Scaled, resnet, rough

KEYS = [f"block:{name}" for name in OPTIONAL]
IMAGES = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])


@cache
def graph() -> Graph:
    return trace(resnet(), IMAGE, blocks=True)


def by_definition(model: nn.Module, branches: list[str], image: Tensor, label: Tensor) -> Tensor:
    """d(loss of a row) / d(factor on the outputs of these modules) at 1."""
    factor = torch.ones((), dtype=image.dtype, requires_grad=True)
    handles = [model.get_submodule(name).register_forward_hook(lambda _m, _i, out: out * factor) for name in branches]
    F.cross_entropy(model(image[None]), label[None]).backward()
    for handle in handles:
        handle.remove()
    assert factor.grad is not None
    return factor.grad


def check(model: nn.Module, graph: Graph, branches: dict[str, list[str]], images: Tensor, labels: Tensor) -> None:
    s = {
        key: torch.stack([by_definition(model, names, *row) for row in zip(images, labels, strict=True)])
        for key, names in branches.items()
    }
    sums = accumulate(model, graph, [(images[:3], labels[:3]), (images[3:], labels[3:])])
    for key, s_N in s.items():
        assert s_N.abs().min() > 0
        wanted = {
            "sum": s_N.sum(),
            "abs": s_N.abs().sum(),
            "square": s_N.square().sum(),
            "fourth": s_N.pow(4).sum(),
        }
        for kind, value in wanted.items():
            torch.testing.assert_close(sums[f"gate_{kind}/{key}"], value.double().reshape(1), rtol=1e-6, atol=1e-12)


def test_terms_without_an_axis_are_summed_over_all_elements():
    x, grad = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), torch.tensor([[[1.0, 1.0]], [[0.0, -1.0]]])
    assert gate_terms(x, grad, None).tolist() == [[3.0], [-4.0]]


def test_a_blocks_sums_are_those_of_the_change_of_each_rows_loss():
    """ResNet's block: the sum is written into the branch itself."""
    branches = {key: [f"{name}.bn2"] for key, name in zip(KEYS, OPTIONAL, strict=True)}
    check(resnet().double(), graph(), branches, IMAGES.double(), LABELS)


def test_two_branches_are_summed_before_the_absolute_value():
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=4).eval().double()
    images = torch.rand(4, 3, 160, 160, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = replace(propagate(vit, images[:1]), blocks=find_blocks(vit, (images[:2],)))
    branches = {block.key: [f"{block.name}.drop_path1", f"{block.name}.drop_path2"] for block in found.blocks}
    assert len(branches) == 6
    check(vit, found, branches, images, LABELS)


def test_a_scaled_branch_is_taken_where_it_enters_the_sum():
    model = rough(Network(Scaled(8), Scaled(8))).double()
    found = replace(propagate(model, IMAGE.double()), blocks=find_blocks(model, (IMAGES.double(),)))
    check(model, found, {f"block:blocks.{i}": [f"blocks.{i}.drop"] for i in (0, 1)}, IMAGES.double(), LABELS)


def test_the_saliency_is_the_slope_of_the_loss_towards_the_network_without_the_block():
    model, step = resnet().double(), 1e-4
    s = accumulate(model, graph(), [(IMAGES.double(), LABELS)])["gate_sum/block:blocks.2"]

    def loss(factor: float) -> Tensor:
        handle = model.blocks[2].bn2.register_forward_hook(lambda _m, _i, out: out * factor)
        with torch.no_grad():
            found = F.cross_entropy(model(IMAGES.double()), LABELS, reduction="sum")
        handle.remove()
        return found

    slope = (loss(1 + step) - loss(1 - step)) / (2 * step)
    torch.testing.assert_close(s[0], slope, rtol=1e-4, atol=1e-8)


def test_channels_have_the_sums_that_they_have_without_blocks():
    alone = accumulate(resnet(), replace(graph(), blocks=()), [(IMAGES, LABELS)])
    together = accumulate(resnet(), graph(), [(IMAGES, LABELS)])
    assert all(torch.equal(together[name], value) for name, value in alone.items())
    assert together.keys() - alone.keys() == {
        f"gate_{kind}/{key}" for kind in ("sum", "abs", "square", "fourth") for key in KEYS
    }


def test_a_network_of_blocks_alone_is_scored():
    only = replace(graph(), groups=())
    assert set(score(resnet(), only, [(IMAGES, LABELS)])) == set(KEYS)


def test_blocks_are_summed_exactly_on_grids_of_their_own():
    task = GateStatistics(resnet(), graph())
    task.to(torch.device("cpu"))
    parts = [task(IMAGES[i : i + 1], LABELS[i : i + 1]) for i in range(4)]
    grid = Grid.from_pilot(magnitudes(parts[0], task.segments), 4, segments=task.segments)
    assert len(grid.exponents["gate_abs"]) == len(graph().groups) + 3
    totals = []
    for order in ((0, 1, 2, 3), (2, 0, 3, 1)):
        sums = ExactSums(grid)
        for i in order:
            sums.add(parts[i])
        totals.append(by_group(graph(), sums.values()))
    assert all(torch.equal(totals[0][f"gate_square/{key}"], totals[1][f"gate_square/{key}"]) for key in KEYS)


# --- rules ------------------------------------------------------------------------------------------------------------


def stored(**by_kind: list[float]) -> dict[str, Tensor]:
    """Statistics of 2 rows: of each block as given, of all channels ones."""
    found: dict[str, Tensor] = {"rows": torch.tensor(2)}
    for kind, values in by_kind.items():
        found |= {f"{kind}/{group.name}": torch.ones(group.size).double() for group in graph().groups}
        found |= {f"{kind}/{key}": torch.tensor([value]).double() for key, value in zip(KEYS, values, strict=True)}
    return found


def blocks_of(name: str, statistics: dict[str, Tensor], seed: int = 0) -> list[float]:
    saliency = criteria.rule("channels", name).fn(graph(), statistics, resnet().state_dict(), seed)
    assert all(saliency[key].shape == (1,) for key in KEYS)
    return [saliency[key].item() for key in KEYS]


def test_rules_for_gates_worked_out_by_hand():
    statistics = stored(gate_abs=[4.0, 2.0, 6.0], gate_square=[8.0, 2.0, 4.0], gate_sum=[-4.0, 2.0, 0.0])
    assert blocks_of("taylor", statistics) == [2.0, 1.0, 3.0]
    assert blocks_of("taylor_square", statistics) == [4.0, 1.0, 2.0]
    assert blocks_of("signed_taylor", statistics) == [2.0, 1.0, 0.0]
    assert blocks_of("fisher", statistics) == [2.0, 0.5, 1.0]
    values = [2 * 8 * 16, 2 * 16 * 16, 2 * 16 * 16]  # two convolutions of so many channels on 4 x 4 positions
    assert blocks_of("group_fisher", statistics) == [f / v for f, v in zip([2.0, 0.5, 1.0], values, strict=True)]


def test_a_rule_for_weights_is_summed_over_the_blocks_contractions():
    gradients = {f"grad_abs/{c.tensor}": torch.ones(graph().shapes[c.tensor]) for c in graph().contractions}
    assert blocks_of("gradient", {"rows": torch.tensor(2), **gradients}) == [576.0, 2304.0, 2304.0]


@pytest.mark.parametrize(("name", "power"), [("magnitude_l1", 1), ("magnitude_l2", 2), ("magnitude", 2)])
def test_the_magnitude_of_a_block_is_that_of_its_mean_weight_over_the_blocks_mean(name, power):
    state = resnet().state_dict()
    weights = [torch.cat([state[f"{b}.conv{i}.weight"].double().flatten() for i in (1, 2)]) for b in OPTIONAL]
    norms = torch.stack([w.abs().pow(power).mean().pow(1 / power) for w in weights])
    torch.testing.assert_close(torch.tensor(blocks_of(name, {})).double(), norms / norms.mean())


def test_the_random_control_depends_on_the_seed_and_the_blocks_name_alone():
    assert blocks_of("random", {}, seed=5) == [uniform(f"5/{key}", (1,)).item() for key in KEYS]


def test_of_several_criteria_blocks_are_ranked_among_themselves():
    statistics = stored(gate_abs=[4.0, 2.0, 6.0], gate_square=[8.0, 2.0, 4.0])
    fused = criteria.rule("channels", "taylor", "fisher").fn(graph(), statistics, {}, 0)
    assert [fused[key].item() * 6 for key in KEYS] == pytest.approx([2 + 3, 1 + 1, 3 + 2])


def test_criteria_that_say_nothing_about_blocks_are_known():
    silent = {name for name, criterion in CRITERIA.items() if criterion.channels and not criterion.channels.blocks}
    assert silent == {"activation_mean", "activation_variance", "bn_scale", "hard_concrete"}
    assert not criteria.rule("channels", "taylor", "bn_scale").blocks
    assert criteria.rule("channels", "taylor", "fisher").blocks
