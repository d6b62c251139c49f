"""Surgery: which entries stay, which attributes follow, and that cut and masked network compute the same."""

from __future__ import annotations

import copy
import io
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import cloudpickle
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from pipeline.models.graph import Graph, Group, Member
from pipeline.models.standalone import edits_of, original_class
from pipeline.pruning.plan import Plan, planned
from pipeline.pruning.reference import mask
from pipeline.pruning.surgery import PlanMismatch, cut, cut_slices, named_tensors
from pipeline.pruning.trials import random_subsets, trace
from pipeline.pruning.verify import verify
from tests.graphs import chain, index
from tests.pruning.networks import INPUT_SHAPE, mixed, mixed_graph


def _mlp(*widths: int) -> nn.Module:
    return _named({f"fc{i}": nn.Linear(a, b) for i, (a, b) in enumerate(itertools.pairwise(widths))})


def _named(layers: dict[str, nn.Module]) -> nn.Module:
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def _entries(*values: int) -> Tensor:
    return torch.tensor(values)


# --- which entries stay ---------------------------------------------------------------------------------------------


def test_cut_keeps_the_listed_rows_and_the_columns_that_read_them():
    model = _mlp(2, 3, 2)
    model.fc0.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    model.fc0.bias.data = torch.tensor([7.0, 8.0, 9.0])
    model.fc1.weight.data = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    small = cut(model, planned(chain(2, 3, 2), {"fc0": [0, 2]}))
    assert small.fc0.weight.tolist() == [[1.0, 2.0], [5.0, 6.0]]
    assert small.fc0.bias.tolist() == [7.0, 9.0]
    assert small.fc1.weight.tolist() == [[1.0, 3.0], [4.0, 6.0]]
    assert (small.fc0.out_features, small.fc1.in_features, small.fc1.out_features) == (2, 2, 2)


@settings(max_examples=40)
@given(st.data())
def test_cut_network_equals_masked_network_for_any_plan(data):
    model, graph = mixed().double(), mixed_graph()
    kept = {
        group.name: data.draw(st.sets(st.integers(0, group.size - 1), min_size=1), label=group.name)
        for group in graph.groups
    }
    plan = planned(graph, kept)
    small = cut(model, plan)
    images = torch.randn(3, *INPUT_SHAPE[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    verify(small, mask(model, plan), images).require(1e-12)
    assert sum(p.numel() for p in small.parameters()) == plan.kept.params


def test_a_plan_that_keeps_everything_gives_an_equal_copy():
    model = mixed()
    small = cut(model, planned(mixed_graph(), {}))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(named_tensors(model), named_tensors(small), strict=True))
    assert all(a is not b for (_, a), (_, b) in zip(named_tensors(model), named_tensors(small), strict=True))


def test_cut_leaves_the_dense_model_as_it_was():
    model = mixed()
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    before = {name: tensor.clone() for name, tensor in named_tensors(model)}
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    described = repr(model)
    small = cut(model, planned(mixed_graph(), {"stem": [1, 2], "a": [0], "e": [3]}))
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(model))
    assert all(torch.equal(parameter.grad, grads[name]) for name, parameter in model.named_parameters())
    assert repr(model) == described


def test_cut_keeps_dtype_requires_grad_and_memory_format_and_drops_gradients():
    model = mixed().to(memory_format=torch.channels_last).bfloat16()
    model.grouped.weight.requires_grad_(False)
    model(torch.randn(2, 3, 4, 4).bfloat16()).sum().backward()
    small = cut(model, planned(mixed_graph(), {"stem": [1, 2, 5], "e": [0, 3]}))
    assert small.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert not small.stem.weight.is_contiguous()
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert [name for name, p in small.named_parameters() if not p.requires_grad] == ["grouped.weight"]
    assert all(parameter.grad is None for parameter in small.parameters())
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in small.parameters())


# --- tied and parametrised ------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A token table that is the classifier, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


def test_tied_parameters_stay_one_object_and_both_modules_follow():
    model = Tied()
    small = cut_slices(model, {"embed.weight": {1: _entries(0, 2, 5)}})
    assert small.head.weight is small.embed.weight
    assert len(list(small.parameters())) == 1
    assert (small.embed.embedding_dim, small.head.in_features, small.head.out_features) == (3, 3, 10)
    assert small(torch.tensor([[1, 2]])).shape == (1, 2, 10)


def test_names_of_a_tied_tensor_that_disagree_are_refused():
    slices = {"embed.weight": {1: _entries(0, 1)}, "head.weight": {1: _entries(0, 2)}}
    with pytest.raises(PlanMismatch, match=r"head\.weight is tied"):
        cut_slices(Tied(), slices)


@pytest.mark.parametrize("parametrise", [weight_norm, spectral_norm])
def test_parametrised_weights_are_cut_at_their_originals(parametrise):
    torch.manual_seed(0)
    model = _named({"a": parametrise(nn.Conv2d(3, 6, 3)), "b": parametrise(nn.Conv2d(6, 4, 1))}).eval()
    members = [Member("a.bias", 0, index(6), "affine")]
    for name, tensor in named_tensors(model):  # the originals, weight_norm's lengths, spectral_norm's vectors
        if name.startswith("a.param") and tensor.shape[0] == 6:
            members.append(Member(name, 0, index(6), "out"))
        if name.startswith("b.param") and tensor.dim() == 4 and tensor.shape[1] == 6:
            members.append(Member(name, 1, index(6), "in"))
        if name.startswith("b.param") and tensor.dim() == 1 and tensor.shape[0] == 6:
            members.append(Member(name, 0, index(6), "in"))
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
    parameters = tuple(name for name, _ in model.named_parameters())
    graph = Graph((Group("a", 6, tuple(members), ()),), (), (), shapes, parameters, (1, 3, 5, 5))
    plan = planned(graph, {"a": [0, 3, 4]})
    small = cut(model, plan)
    assert (small.a.out_channels, small.b.in_channels) == (3, 3)
    assert tuple(small.a.weight.shape) == (3, 3, 3, 3)
    # spectral_norm takes products of vectors, which labels do not go through: trace freezes it, and mask cannot follow it
    reference = mask(model, plan) if parametrise is weight_norm else _with_zeros(model, plan)
    verify(small, reference, torch.randn(2, 3, 5, 5)).require(1e-5)


def _with_zeros(model: nn.Module, plan: Plan) -> nn.Module:
    zeros = copy.deepcopy(model)
    tensors = dict(named_tensors(zeros))
    for group in plan.groups:
        for member in group.members:
            gone = member.index_CK[list(group.removed)].reshape(-1)
            tensors[member.tensor].data.index_fill_(member.dim, gone, 0)
    return zeros


# --- attributes -----------------------------------------------------------------------------------------------------


def test_whole_groups_make_fewer_groups_and_depthwise_follows_its_channels():
    small = cut(mixed(), planned(mixed_graph(), {"e": [0, 2, 3], "a": [1, 4, 5, 6, 11]}))
    assert (small.grouped.groups, small.grouped.in_channels, small.grouped.out_channels) == (3, 12, 12)
    assert (small.depthwise.groups, small.depthwise.in_channels, small.depthwise.out_channels) == (5, 5, 5)
    assert (small.bn_a.num_features, small.fc.in_features, small.expand.out_channels) == (5, 48, 5)


def test_the_same_offsets_in_each_group_make_narrower_groups():
    conv = nn.Sequential(nn.Conv2d(8, 6, 1, groups=2))
    small = cut_slices(
        conv, {"0.weight": {0: _entries(0, 2, 3, 5), 1: _entries(1, 2)}, "0.bias": {0: _entries(0, 2, 3, 5)}}
    )
    assert (small[0].groups, small[0].in_channels, small[0].out_channels) == (2, 4, 4)
    assert small(torch.randn(1, 4, 2, 2)).shape == (1, 4, 2, 2)


def test_uneven_groups_are_refused_with_the_counts():
    conv = nn.Sequential(nn.Conv2d(8, 6, 1, groups=2, bias=False))
    with pytest.raises(PlanMismatch, match=r"groups=2 blocks of 3, and the plan keeps \[2, 3\]"):
        cut_slices(conv, {"0.weight": {0: _entries(0, 2, 3, 4, 5)}})


@pytest.mark.parametrize(
    ("module", "slices", "expected"),
    [
        (nn.ConvTranspose2d(6, 8, 2), {"weight": {0: 3, 1: 2}}, {"in_channels": 3, "out_channels": 2, "groups": 1}),
        (nn.ConvTranspose2d(6, 6, 2, groups=6), {"weight": {0: 4}}, {"in_channels": 4, "out_channels": 4, "groups": 4}),
        (nn.Conv1d(4, 4, 1), {"weight": {0: 3}}, {"in_channels": 4, "out_channels": 3, "groups": 1}),
        (nn.LayerNorm(6), {"weight": {0: 4}}, {"normalized_shape": (4,)}),
        (nn.GroupNorm(3, 6), {"weight": {0: 4}}, {"num_groups": 2, "num_channels": 4}),
        (nn.BatchNorm1d(6, affine=False), {"running_mean": {0: 2}}, {"num_features": 2}),
        (nn.PReLU(6), {"weight": {0: 5}}, {"num_parameters": 5}),
        (nn.Embedding(9, 6), {"weight": {1: 5}}, {"num_embeddings": 9, "embedding_dim": 5}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_attributes_follow_the_tensors(module, slices, expected):
    kept = {f"0.{name}": {d: torch.arange(n) for d, n in dims.items()} for name, dims in slices.items()}
    small = cut_slices(nn.Sequential(module), kept)[0]
    assert {name: getattr(small, name) for name in expected} == expected


@pytest.mark.parametrize("fused", [True, False])
def test_attention_without_two_of_four_heads_ignores_what_they_computed(fused):
    torch.manual_seed(0)
    model = _named({"fc": nn.Linear(12, 12), "attention": Attention(12, num_heads=4)}).eval()
    attention = model.attention
    attention.fused_attn = fused
    small = cut(model, planned(trace(model, torch.zeros(1, 5, 12)), {"attention.qkv": [1, 3]}))
    masked = copy.deepcopy(model)
    masked.attention.proj.weight.data[:, index(4, width=3)[[0, 2]].reshape(-1)] = 0
    assert (small.attention.num_heads, small.attention.head_dim, attention.num_heads) == (2, 3, 4)
    verify(small, masked, torch.randn(2, 5, 12)).require(1e-6)


def test_the_width_before_a_timm_classifier_follows():
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet", num_classes=3)
    classifier = model.get_classifier()
    name = next(name for name, module in model.named_modules() if module is classifier)
    small = cut_slices(model, {f"{name}.weight": {1: torch.arange(10)}})
    assert (small.num_features, small.get_classifier().in_features) == (10, 10)


# --- what the code states --------------------------------------------------------------------------------------------


class Stating(nn.Module):
    """The code states how many channels there are: in an attribute, in a list, and in two expressions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc0, self.fc1, self.fc2 = nn.Linear(3, 10), nn.Linear(4, 5), nn.Linear(6, 5)
        self.width, self.parts = 4, [4, 6]

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fc0(x).split(self.parts, dim=-1)
        a = a.reshape(len(x), self.width)
        return self.fc1(a) + self.fc2(halved(b.reshape(len(x), 2 * 3)))


def halved(b: Tensor) -> Tensor:
    return b.reshape(len(b), 6) / 2


STATED = {"fc0": [0, 3], "fc0#2": [1, 2, 5]}


@pytest.fixture
def stating() -> nn.Module:
    torch.manual_seed(0)
    return Stating().eval()


def _stating_plan(model: nn.Module) -> Plan:
    return planned(trace(model, torch.zeros(2, 3)), STATED)


def test_a_cut_sets_attributes_and_elements_of_lists_and_rewrites_expressions(stating):
    plan, x = _stating_plan(stating), torch.randn(4, 3)
    small = cut(stating, plan)
    assert (small.width, small.parts) == (2, [2, 3])
    assert [edit[3:] for edit in edits_of(small)] == [["2 * 3", 3], ["6", 3]]
    assert (stating.width, stating.parts, edits_of(stating)) == (4, [4, 6], [])
    assert type(stating) is original_class(small) is Stating
    verify(small, mask(stating, plan), x).require(1e-6)


def test_a_second_cut_goes_on_from_the_first(stating):
    once = cut(stating, _stating_plan(stating))
    plan = planned(trace(once, torch.zeros(2, 3)), {"fc0": [1], "fc0#2": [0, 2]})
    twice = cut(once, plan)
    assert (twice.width, twice.parts) == (1, [1, 2])
    assert [edit[3:] for edit in edits_of(twice)] == [["2 * 3", 2], ["6", 2]]
    assert [edit[3:] for edit in edits_of(once)] == [["2 * 3", 3], ["6", 3]]
    verify(twice, mask(once, plan), torch.randn(4, 3)).require(1e-6)


def test_a_second_cut_that_changes_no_size_keeps_the_numbers_of_the_first(stating):
    once = cut(stating, _stating_plan(stating))
    twice = cut(once, planned(trace(once, torch.zeros(2, 3)), {}))
    assert edits_of(twice) == edits_of(once)
    assert torch.equal(twice(torch.ones(4, 3)), once(torch.ones(4, 3)))


def _through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file, pickle_module=cloudpickle)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: cloudpickle.loads(cloudpickle.dumps(model)), _through_torch_save]
)
def test_a_rewritten_network_can_be_copied_pickled_by_ray_and_saved(stating, copied):
    small = cut(stating, _stating_plan(stating))
    again = copied(small)
    assert torch.equal(again(torch.ones(4, 3)), small(torch.ones(4, 3)))
    assert edits_of(again) == edits_of(small)
    assert isinstance(again, Stating)


def test_a_source_that_has_changed_since_the_trace_is_refused(stating):
    plan = _stating_plan(stating)
    changed = replace(plan, sizes=tuple(replace(s, text=s.text.replace("2 * 3", "3 * 2")) for s in plan.sizes))
    with pytest.raises(ValueError, match=r"Stating\.forward no longer reads 3 \* 2: its source has changed"):
        cut(stating, changed)


def test_any_cut_of_it_equals_its_mask(stating):
    model = stating.double()
    graph = trace(model, torch.zeros(2, 3).double())
    for trial in range(5):
        plan = planned(graph, random_subsets(graph, seed=1, trial=trial))
        images = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(trial))
        verify(cut(model, plan), mask(model, plan), images).require(1e-12)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_plan_for_another_width_is_refused_and_names_the_tensors():
    plan = planned(mixed_graph(), {"stem": [0, 1]})
    with pytest.raises(
        PlanMismatch, match=r"stem\.weight has shape \(10, 3, 3, 3\), the plan was made for \(8, 3, 3, 3\)"
    ):
        cut(mixed(width=10), plan)


def test_a_plan_is_not_replayed_on_what_it_has_cut():
    plan = planned(mixed_graph(), {"h": [0, 1]})
    with pytest.raises(PlanMismatch, match=r"h\.weight has shape \(2, 8, 1, 1\)"):
        cut(cut(mixed(), plan), plan)


def test_a_plan_for_another_network_names_what_is_missing():
    with pytest.raises(PlanMismatch, match=r"fc0\.bias \(3,\) is not in the model.*fc0\.weight"):
        cut(mixed(), planned(chain(2, 3, 2), {"fc0": [0]}))


def test_a_replayed_plan_cuts_another_copy_alike():
    plan = planned(mixed_graph(), {"stem": [0, 3, 4], "e": [1]})
    first, second = cut(mixed(), plan), cut(mixed(), type(plan).from_json(plan.to_json()))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(named_tensors(first), named_tensors(second), strict=True))
