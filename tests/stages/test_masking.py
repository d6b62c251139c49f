"""Masks inside the cut network: one budget for channels and weights, controls by their own rules, what stays whole and why."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from pipeline import artifacts, stages
from pipeline.config import BudgetConfig, MasksConfig, ModelConfig, ScoreConfig, SparsifyConfig
from pipeline.models.graph import Contraction, Graph
from pipeline.pruning.masks import load_masks, masked
from pipeline.pruning.plan import planned
from pipeline.pruning.sparsity import kept_fraction
from pipeline.pruning.surgery import cut
from pipeline.run import Run
from pipeline.saliency.criteria import rule
from pipeline.saliency.weight_rules import uniform
from pipeline.stages.masking import Scores, _maskable, check_masks, require_maskable
from pipeline.stages.planning import budget_inputs, channel_budget, kinds_needed, networks
from tests.test_run import config, write_rows

RESNET = ModelConfig(name="tests.residual:resnet", pretrained=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight


def test_a_tied_weight_is_masked_under_all_its_names_and_the_network_stays():
    network = Tied()
    state = masked(network, {"a.weight": torch.zeros(3, 3, dtype=torch.bool)}).state_dict()
    assert not state["a.weight"].any()
    assert not state["b.weight"].any()
    again = Tied()
    again.load_state_dict(state)
    assert not again.a.weight.any()
    assert network.a.weight.all()


# --- what stays whole -----------------------------------------------------------------------------------------------


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.bare = nn.Parameter(torch.ones(4, 16))


def whole(network: nn.Module | None = None, **settings: object) -> dict[str, str]:
    """Name -> why it stays whole, where statistics of `conv` and `depthwise` are stored."""
    network = network or Parts()
    shapes = {name: tuple(tensor.shape) for name, tensor in Parts().state_dict().items()}
    names = ["conv.weight", "depthwise.weight", "up.weight", "bare"]
    graph = Graph((), (), tuple(Contraction(name, 1) for name in names), shapes, tuple(shapes), (1, 8, 8, 8))
    masks = MasksConfig(**settings)
    run = SimpleNamespace(config=SimpleNamespace(masks=masks), graph=lambda: graph)
    stored = {f"input_square/{name}": torch.ones(8) for name in names[:2]}
    fraction = kept_fraction(masks.pattern, masks.keep)
    return _maskable(run, rule("weights", *masks.criterion), network, fraction, stored)[1]


def test_what_cannot_be_masked_stays_whole_with_its_reason():
    assert whole(pattern="unstructured", keep=0.5, criterion="magnitude") == {}
    assert whole(pattern="2:4", criterion="magnitude") == {
        "depthwise.weight": "its shape [8, 1, 3, 3] has no 2:4 along the inputs",
        "up.weight": "a transposed convolution has its inputs in the first dimension",
    }
    assert whole(pattern="unstructured", keep=0.1, criterion="wanda") == {
        "depthwise.weight": "0.1 of the 9 weights of an output is less than one",
        "up.weight": "a transposed convolution has its inputs in the first dimension",
        "bare": "no input_square is recorded of it",
    }
    assert set(whole(pattern="unstructured", keep=0.5, criterion="magnitude", only="conv*")) == {
        "depthwise.weight",
        "up.weight",
        "bare",
    }
    blocks = whole(pattern="input:8", keep=0.7, criterion="magnitude", only="[cb]*")  # one block, and two
    assert blocks["conv.weight"] == "0.7 of the 1 blocks is less than one"
    assert "bare" not in blocks


def test_a_pattern_is_judged_by_the_shapes_of_the_cut_network():
    small = Parts()
    small.conv = nn.Conv2d(6, 8, 3)
    why = whole(small, pattern="2:4", criterion="magnitude")
    assert why["conv.weight"] == "its shape [8, 6, 3, 3] has no 2:4 along the inputs"


# --- scores ---------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_uncut_network_at_the_kept_entries():
    seen = []

    def fn(name: str, stored: dict[str, Tensor], weights: dict[str, Tensor], seed: int) -> Tensor:
        seen.append(name)
        return weights[name] * 10

    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([[7.0]])}
    scores = Scores(SimpleNamespace(fn=fn), ["a", "b"], {}, weights, 0, {"a": {1: torch.tensor([0, 2])}})
    assert (list(scores), len(scores), seen) == (["a", "b"], 2, [])
    assert scores["a"].tolist() == [[0.0, 20.0], [30.0, 50.0]]
    assert scores["b"].tolist() == [[70.0]]
    assert seen == ["a", "b"]


# --- budgets --------------------------------------------------------------------------------------------------------


def at(tmp_path: Path, **changes: object) -> Run:
    """A run on the small ResNet that scores without rows."""
    score = ScoreConfig(criterion="magnitude", rows_per_unit=8, micro_batch=8)
    values = {"model": RESNET, "score": score, **changes}
    return Run(config(write_rows(tmp_path / "rows.parquet"), tmp_path / "run", **values))


def until_masked(run: Run) -> Run:
    for stage in (stages.dense, stages.trace_groups, require_maskable, stages.plan, stages.cut_and_verify):
        stage(run)
    stages.mask_weights(run)
    return run


def nonzero(run: Run, name: str) -> int:
    network = run.network(f"{name}-masked", plan=name)
    return sum(int(parameter.count_nonzero()) for parameter in network.parameters())


@pytest.mark.parametrize(("share", "channels"), [(0.5, 0.5), (0.25, 0.353553390593)])
def test_one_budget_holds_for_channels_and_weights_to_the_element(tmp_path: Path, share: float, channels: float):
    masks = MasksConfig(pattern="unstructured", criterion="magnitude", scope="global", share=share)
    run = until_masked(at(tmp_path, budget=BudgetConfig(params=0.25), masks=masks))
    assert channel_budget(run).as_dict() == {"params": channels}  # 0.25 to the power of 1 - share
    assert budget_inputs(run)["params"] == channels
    for name in networks(run):
        plan, about = run.plan(name), artifacts.read_json(run.path("weight_masks.json"))[name]
        assert plan.budget == {"params": channels}
        assert 0.25 * plan.dense.params < plan.kept.params <= channels * plan.dense.params
        assert nonzero(run, name) == about["nonzero"] == plan.dense.params // 4


def test_controls_are_masked_by_their_own_rules_at_the_same_size(tmp_path: Path):
    masks = MasksConfig(pattern="unstructured", criterion="lamp")
    run = until_masked(at(tmp_path, budget=BudgetConfig(params=0.3), masks=masks))
    about = artifacts.read_json(run.path("weight_masks.json"))
    assert {name: (one["criterion"], one["scope"]) for name, one in about.items()} == {
        "ours": ("lamp", "global"),
        "random": ("random", "layer"),
        "magnitude": ("magnitude", "layer"),
    }
    most = math.floor(0.3 * run.plan("ours").dense.params)
    assert about["ours"]["nonzero"] == most
    for name in ("random", "magnitude"):
        num_layers = len(run.weight_masks(name))
        assert most - num_layers < about[name]["nonzero"] <= most
    mask = run.weight_masks("random")["blocks.1.conv2.weight"]
    score = uniform("0/blocks.1.conv2.weight", (16, 16, 3, 3))
    for dim, kept in run.plan("random").slices().get("blocks.1.conv2.weight", {}).items():
        score = score.index_select(dim, kept)
    assert mask.shape == score.shape
    assert score[mask].min() > score[~mask].max()


def test_rows_too_short_for_the_fraction_stay_whole_and_the_others_make_up_for_it(tmp_path: Path):
    masks = MasksConfig(pattern="unstructured", criterion="magnitude", scope="row", share=0.9)
    run = until_masked(at(tmp_path, budget=BudgetConfig(params=0.1), masks=masks))
    about, most = artifacts.read_json(run.path("weight_masks.json"))["ours"], run.plan("ours").dense.params // 10
    assert [*about["whole"]] == ["blocks.1.shortcut.weight"]  # at most 8 inputs, of which about a tenth would stay
    assert 0.9 * most < about["nonzero"] <= most
    for mask in run.weight_masks("ours").values():
        assert len(set(mask.flatten(1).sum(1).tolist())) == 1


def test_masks_beside_an_independent_budget_keep_their_own_fraction(tmp_path: Path):
    masks = MasksConfig(pattern="unstructured", criterion="magnitude", scope="global", keep=0.3)
    run = until_masked(at(tmp_path, budget=BudgetConfig(macs=0.5), masks=masks))
    about = artifacts.read_json(run.path("weight_masks.json"))["ours"]
    assert run.plan("ours").budget == {"macs": 0.5}
    assert budget_inputs(run) == run.config.budget.model_dump(mode="json", exclude={"max_blocks"})
    assert about["kept"] == math.floor(0.3 * about["weights"])
    assert about["nonzero"] == run.plan("ours").kept.params - about["weights"] + about["kept"] == nonzero(run, "ours")


def narrow_and_wide() -> nn.Module:
    """64 channels go eight at a time, 12 one at a time."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 64, 3, 4), nn.ReLU(), nn.Conv2d(64, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1)]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def test_two_of_four_is_judged_by_the_shapes_that_the_cut_leaves(tmp_path: Path):
    model = ModelConfig(name="tests.stages.test_masking:narrow_and_wide", pretrained=False)
    masks = MasksConfig(pattern="2:4", criterion="magnitude")
    run = until_masked(at(tmp_path, model=model, budget=BudgetConfig(params=0.55), masks=masks))
    about, masks = artifacts.read_json(run.path("weight_masks.json"))["ours"], run.weight_masks("ours")
    kept = {group.name: len(group.kept) for group in run.plan("ours").groups}
    assert (run.plan("ours").budget, kept) == ({"params": 0.55}, {"0": 40, "2": 7, "4": 6})
    assert about["whole"] == {
        "0.weight": "its shape [40, 3, 3, 3] has no 2:4 along the inputs",
        "4.weight": "its shape [6, 7, 1, 1] has no 2:4 along the inputs",
        "7.weight": "its shape [4, 6] has no 2:4 along the inputs",
    }
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {"2.weight": (7, 40, 1, 1)}
    assert bool((masks["2.weight"].unflatten(1, (-1, 4)).sum(2) == 2).all())
    assert (about["kept"], about["weights"]) == (7 * 20, 7 * 40)


def test_a_control_that_no_pattern_fits_stays_whole(tmp_path: Path):
    model = ModelConfig(name="tests.stages.test_masking:narrow_and_wide", pretrained=False)
    masks = MasksConfig(pattern="2:4", criterion="magnitude", only="4.weight")  # its 12 inputs, or those that are left
    run = at(tmp_path, model=model, budget=BudgetConfig(params=0.55), masks=masks)
    for stage in (stages.dense, stages.trace_groups, stages.plan, stages.cut_and_verify):
        stage(run)
    artifacts.write_bytes(run.plan_path("ours"), planned(run.graph(), {"4": [0, 1]}).to_json().encode())
    run = Run(run.config)
    run.save_network("ours-cut", cut(run.network("dense"), run.plan("ours")).state_dict())
    stages.mask_weights(run)
    about = artifacts.read_json(run.path("weight_masks.json"))
    assert (about["ours"]["kept"], about["ours"]["weights"]) == (2 * 6, 2 * 12)
    assert (about["random"]["weights"], run.weight_masks("random")) == (0, {})
    assert nonzero(run, "random") == about["random"]["nonzero"] == run.plan("random").kept.params


def test_without_a_budget_every_channel_stays_and_weights_are_masked(tmp_path: Path):
    masks = MasksConfig(pattern="unstructured", criterion="magnitude", keep=0.25)
    run = until_masked(at(tmp_path, budget=BudgetConfig(), masks=masks, score=ScoreConfig(criterion="taylor")))
    assert kinds_needed(run) == set()  # what would judge channels is not read
    for name in networks(run):
        plan = run.plan(name)
        assert (plan.budget, plan.kept) == ({}, plan.dense)
        assert all(len(group.kept) == group.size for group in plan.groups)
        dense, cut = (
            artifacts.read_tensors(run.path("networks", f"{n}.safetensors")) for n in ("dense", f"{name}-cut")
        )
        assert all(torch.equal(dense[key], cut[key]) for key in dense)
    assert artifacts.read_json(run.path("verify.json"))["ours"]["max_abs"] == 0
    assert not artifacts.exists(run.path("saliency", "ours.safetensors"))
    mask = run.weight_masks("ours")["blocks.0.conv1.weight"]
    assert int(mask.sum()) == 8 * 8 * 9 // 4


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))


def test_a_network_without_channel_groups_can_be_masked(tmp_path: Path):
    masks = MasksConfig(pattern="unstructured", criterion="magnitude", keep=0.5)
    model = ModelConfig(name="tests.stages.test_masking:linear", pretrained=False)
    run = until_masked(at(tmp_path, model=model, budget=BudgetConfig(), masks=masks))
    assert run.plan("ours").groups == ()
    assert nonzero(run, "ours") == 3 * 16 * 16 * 4 // 2 + 4


def test_a_run_without_a_pattern_has_no_masks(tmp_path: Path):
    run = at(tmp_path)
    stages.mask_weights(run)
    assert run.weight_masks("ours") == {}
    assert "mask" not in run.manifest.stages


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_masks_of_nothing_are_refused_before_the_scoring(tmp_path: Path):
    run = at(tmp_path, masks=MasksConfig(pattern="9:32"))
    stages.dense(run)
    stages.trace_groups(run)
    with pytest.raises(
        ValueError, match=r"masks.pattern 9:32: no weight can be masked by snip_abs.*its shape \[8, 3, 3"
    ):
        require_maskable(run)


def test_a_budget_that_what_cannot_be_masked_takes_up_is_refused_with_the_ways_out(tmp_path: Path):
    masks = MasksConfig(pattern="unstructured", criterion="magnitude", only="head.weight")
    run = at(tmp_path, budget=BudgetConfig(params=0.3), masks=masks)
    with pytest.raises(ValueError, match=r"budget.params \(0.3\) leaves .* cannot be masked.*masks.share \(now 0.5\)"):
        until_masked(run)


@pytest.mark.parametrize(
    ("budget", "masks", "words"),
    [
        (
            BudgetConfig(macs=0.5),
            {"pattern": "block:4"},
            r"block:4 with budget.macs \(0.5\) needs masks.keep: MACs say nothing .* or budget.params",
        ),
        (BudgetConfig(), {"pattern": "unstructured"}, r"keep \(None\) must be above 0"),
        (BudgetConfig(params=0.5), {"pattern": "4:2"}, "pattern '4:2' is unknown"),
    ],
)
def test_a_fraction_that_is_missing_shows_at_once(tmp_path: Path, budget: BudgetConfig, masks, words: str):
    with pytest.raises(ValueError, match=words):
        check_masks(at(tmp_path, budget=budget, masks=MasksConfig(**masks)))


@pytest.mark.parametrize("pattern", ["unstructured", "block:4", "input:8", "2:4"])
def test_a_budget_of_parameters_says_what_a_pattern_keeps(tmp_path: Path, pattern: str):
    check_masks(at(tmp_path, budget=BudgetConfig(params=0.5), masks=MasksConfig(pattern=pattern)))


# --- weights that are not the dense network's -----------------------------------------------------------------------


def test_channels_and_weights_are_judged_and_cut_as_sparsify_left_them(tmp_path: Path):
    sparsify = SparsifyConfig.model_construct(epochs=1, method=("l1_prox",))
    masks = MasksConfig(pattern="unstructured", keep=0.5, criterion="magnitude")
    run = Run(at(tmp_path, masks=masks).config.model_copy(update={"sparsify": sparsify}))
    stages.dense(run)
    stages.trace_groups(run)
    state = artifacts.read_tensors(run.path("networks", "dense.safetensors"))
    state["blocks.0.conv1.weight"].mul_(-3)
    run.save_network("sparse", state)
    stages.plan(run)
    stages.cut_and_verify(run)
    stages.mask_weights(run)
    weights = run.weights_sha256("sparse")
    assert {run.manifest.stages[name].inputs["weights"] for name in ("plan", "cut", "mask")} == {weights}
    mask = load_masks(run.path("weight_masks", "ours.safetensors"))["blocks.0.conv1.weight"]
    small = state["blocks.0.conv1.weight"]
    for dim, kept in run.plan("ours").slices().get("blocks.0.conv1.weight", {}).items():
        small = small.index_select(dim, kept)
    found = artifacts.read_tensors(run.path("networks", "ours-masked.safetensors"))["blocks.0.conv1.weight"]
    assert torch.equal(found, small * mask)


def test_a_branch_that_cuts_the_dense_weights_takes_nothing_of_sparse_ones(tmp_path: Path):
    old = at(tmp_path).config.model_copy(
        update={"sparsify": SparsifyConfig.model_construct(epochs=1, method=("l1_prox",))}
    )
    other = {"run_dir": str(tmp_path / "new"), "sparsify": SparsifyConfig()}
    old_run, new_run = Run(old), Run(old.model_copy(update=other))
    for stage in ("dense", "trace", "sparsify"):
        old_run.stage(stage, {}, "", lambda: None)
    old_run.save_network("sparse", {"weight": torch.ones(1)})
    stages.branch(old_run, new_run)
    assert sorted(new_run.manifest.stages) == ["dense", "trace"]
    assert not artifacts.exists(new_run.path("networks", "sparse.safetensors"))
