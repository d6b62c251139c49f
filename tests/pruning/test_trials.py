"""Trial cuts: whatever a graph gets wrong is frozen, with its reason; what it gets right stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

from pipeline.models.graph import Frozen, Graph, Group, Member, Site, Size
from pipeline.pruning import trials
from pipeline.pruning.bench import Bench, Failure, StackFrame
from pipeline.pruning.plan import planned
from pipeline.pruning.surgery import named_tensors
from pipeline.pruning.trials import needed, random_subsets, try_cuts
from tests.graphs import Residual, chain, index, residual_graph
from tests.pruning.networks import INPUT_SHAPE, mixed, mixed_graph

IMAGE = torch.zeros(INPUT_SHAPE)
MEMBERS = [(group.name, i) for group in mixed_graph().groups for i in range(len(group.members))]


def _change(graph: Graph, name: str, **changes: object) -> Graph:
    groups = tuple(replace(g, **changes) if g.name == name else g for g in graph.groups)  # type: ignore[arg-type]
    return replace(graph, groups=groups)


def _names(parts: tuple[Group, ...] | tuple[Frozen, ...]) -> list[str]:
    return [part.name if isinstance(part, Group) else part.group for part in parts]


def test_a_right_graph_stays_whole():
    assert try_cuts(mixed(), mixed_graph(), IMAGE) == mixed_graph()
    assert try_cuts(Residual(), residual_graph(), IMAGE) == residual_graph()


# --- mutations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "i"), MEMBERS, ids=[f"{n}-{i}" for n, i in MEMBERS])
def test_a_group_that_lacks_one_member_is_frozen_and_the_others_stay(name, i):
    graph, group = mixed_graph(), mixed_graph().group(name)
    tried = try_cuts(mixed(), _change(graph, name, members=group.members[:i] + group.members[i + 1 :]), IMAGE)
    assert _names(tried.frozen) == [name]
    assert _names(tried.groups) == [g.name for g in graph.groups if g.name != name]
    assert tried.frozen[0].operation == "trial cut"
    assert tried.frozen[0].size == group.size


def test_a_crash_is_told_with_its_error_its_module_and_its_line():
    group = residual_graph().group("a")
    tried = try_cuts(Residual(), _change(residual_graph(), "a", members=group.members[:-1]), IMAGE)
    assert tried.frozen[0].where.startswith("b (graphs.py:")
    assert "RuntimeError: Given groups=1, weight of size" in tried.frozen[0].reason


def test_entries_in_the_wrong_order_run_and_are_found_by_their_values():
    # fc reads channel * 4 + position; this graph says position * 8 + channel: all shapes fit
    wrong = Member("fc.weight", 1, torch.arange(32).reshape(4, 8).t().contiguous(), "in")
    group = residual_graph().group("conv")
    tried = try_cuts(Residual(), _change(residual_graph(), "conv", members=(*group.members[:-1], wrong)), IMAGE)
    assert _names(tried.frozen) == ["conv"]
    assert tried.frozen[0].where == "fc"
    assert "differs from the masked one" in tried.frozen[0].reason


def test_several_wrong_groups_are_all_found():
    graph = mixed_graph()
    for name in ("stem", "reduce", "h"):
        graph = _change(graph, name, members=graph.group(name).members[:-1])
    tried = try_cuts(mixed(), graph, IMAGE)
    assert _names(tried.groups) == ["a", "e"]
    assert sorted(_names(tried.frozen)) == ["h", "reduce", "stem"]


def test_scales_initialised_with_zero_hide_nothing():
    model = Residual()
    nn.init.zeros_(model.b.weight)
    nn.init.zeros_(model.b.bias)
    backwards = Member("b.weight", 1, index(12).flip(0), "in")
    group = residual_graph().group("a")
    tried = try_cuts(model, _change(residual_graph(), "a", members=(*group.members[:-1], backwards)), IMAGE)
    assert _names(tried.frozen) == ["a"]


# --- couplings that only Python knows -------------------------------------------------------------------------------


class SizeTied(nn.Module):
    """Two layers of equal width whose widths meet in a reshape: equal cuts fit, unequal ones do not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc0 = nn.Linear(6, 8)
        self.fc1 = nn.Linear(8, 8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.fc0(x)
        return self.fc2(self.fc1(inside).reshape(x.shape[0], inside.shape[1]))


def test_two_groups_that_only_python_ties_do_not_both_stay():
    tried = try_cuts(SizeTied(), chain(6, 8, 8, 3), torch.zeros(1, 6))
    assert tried.groups == ()
    assert all("shape" in frozen.reason for frozen in tried.frozen)


class TogetherOnly(nn.Module):
    """Each width may shrink alone; when both do, the network computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.fc0 = nn.Linear(6, 8)
        self.fc1 = nn.Linear(8, 9)
        self.fc2 = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.fc0(x)
        outside = self.fc1(inside)
        return self.fc2(outside) * (2.0 if inside.shape[1] < 8 and outside.shape[1] < 9 else 1.0)


def test_of_groups_that_fail_only_together_one_stays():
    tried = try_cuts(TogetherOnly(), chain(6, 8, 9, 3), torch.zeros(1, 6))
    assert (_names(tried.groups), _names(tried.frozen)) == (["fc0"], ["fc1"])


def test_equal_groups_lose_unequal_numbers():
    graph = chain(2, *[64] * 10, 2)
    for trial in range(3):
        kept = random_subsets(graph, seed=0, trial=trial)
        numbers = sorted(len(channels) for channels in kept.values())
        assert len(set(numbers)) == 10
        assert 64 * 0.2 <= numbers[0] < 64 * 0.35
        assert 64 * 0.8 < numbers[-1] < 64


def test_subsets_depend_on_seed_and_trial_and_on_nothing_else():
    graph = mixed_graph()
    assert random_subsets(graph, seed=1, trial=2) == random_subsets(graph, seed=1, trial=2)
    assert random_subsets(graph, seed=1, trial=2) != random_subsets(graph, seed=1, trial=3)
    assert random_subsets(graph, seed=1, trial=2) != random_subsets(graph, seed=2, trial=2)


def test_every_group_loses_and_keeps_something_and_single_channels_stay():
    kept = random_subsets(chain(2, 1, 2, 3, 2), seed=0)
    assert sorted(kept) == ["fc1", "fc2"]
    assert (len(kept["fc1"]), len(kept["fc2"])) in {(1, 1), (1, 2)}


# --- with label propagation -----------------------------------------------------------------------------------------


def test_trace_gives_the_groups_that_were_worked_out_by_hand():
    traced = trials.trace(mixed(), IMAGE)
    assert {group.name: group.size for group in traced.groups} == {g.name: g.size for g in mixed_graph().groups}
    kept = random_subsets(mixed_graph(), seed=0)
    by_trace, by_hand = planned(traced, kept), planned(mixed_graph(), kept)
    assert by_trace.kept == by_hand.kept
    assert {n: {d: k.tolist() for d, k in dims.items()} for n, dims in by_trace.slices().items()} == {
        n: {d: k.tolist() for d, k in dims.items()} for n, dims in by_hand.slices().items()
    }


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet", "test_vit"])
def test_every_cut_of_a_traced_timm_model_equals_its_mask(name):
    model = timm.create_model(name, num_classes=3).eval()
    size = 160 if name == "test_vit" else 32
    traced = trials.trace(model, torch.zeros(1, 3, size, size), num_trials=1)
    assert traced.groups
    bench = Bench(model, (torch.zeros(1, 3, size, size),), seed=9)
    for trial in range(20, 23):
        assert bench.attempt(planned(traced, random_subsets(traced, seed=9, trial=trial))) is None


# --- sizes that the code states -------------------------------------------------------------------------------------


class Stating(nn.Module):
    """One size that need not follow a cut, and one that has to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc0, self.fc1 = nn.Linear(6, 8), nn.Linear(8, 3)
        self.width = 8

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc0(x)[:, :8]
        return self.fc1(h.reshape(len(x), self.width))


def test_only_sizes_that_have_to_follow_are_kept():
    graph = trials.trace(Stating(), torch.zeros(2, 6))
    assert _names(graph.groups) == ["fc0"]
    assert [(size.attribute, size.text) for size in graph.sizes] == [("width", "self.width")]


def _size(line: int, function: str = "forward", module: str = "") -> Size:
    return Size(module, "", None, (function,), line, 0, "8", {"fc0": (0,)}, 0)


def _stopped(*frames: StackFrame) -> Failure:
    return Failure("RuntimeError", "", frames)


def test_sizes_of_the_call_that_stopped_come_first_then_those_of_its_function_from_inside_out_then_all():
    model = nn.ModuleDict({"a": Stating(), "b": Stating()})
    sizes = [_size(1, module="a"), _size(4, module="a"), _size(4, module="b"), _size(2, "other", module="a")]
    inside, outside = StackFrame(Stating, "forward", 3, 5), StackFrame(Stating, "other", 9, 9)
    assert needed(model, _stopped(inside, outside), sizes) == sizes[1:3]
    assert needed(model, _stopped(replace(inside, first_line=7, last_line=8), outside), sizes) == sizes[:3]
    assert needed(model, _stopped(outside), sizes) == sizes[3:]
    assert needed(model, _stopped(StackFrame(nn.Linear, "forward", 3, 5)), sizes) == sizes
    assert needed(model, Failure("it differs", ""), sizes) == sizes


def test_a_size_that_changes_the_dense_network_is_never_stated():
    # as if the attribute counted two channels: then the dense network itself stops
    size = Size("", "width", None, ("forward",), 2, 42, "self.width", {"fc0": (0, 1)}, 0)
    wrong = replace(chain(6, 8, 3), sizes=(size,))
    tried = try_cuts(Stating(), wrong, torch.zeros(1, 6))
    assert tried.sizes == ()
    assert _names(tried.frozen) == ["fc0"]


# --- manners --------------------------------------------------------------------------------------------------------


def test_trials_leave_the_model_and_the_random_numbers_alone():
    model, graph = mixed().train(), mixed_graph()
    before = {name: tensor.clone() for name, tensor in named_tensors(model)}
    state = torch.get_rng_state()
    try_cuts(model, graph, IMAGE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_same_seed_freezes_the_same_groups():
    graph = _change(mixed_graph(), "h", members=mixed_graph().group("h").members[:-1])
    assert try_cuts(mixed(), graph, IMAGE, seed=3) == try_cuts(mixed(), graph, IMAGE, seed=3)


def test_no_weight_of_the_bench_is_zero_and_normalised_activations_stay_near_one():
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(60))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = (x + layer(x)).relu()
            return x

    bench = Bench(Deep(), (torch.zeros(1, 4, 8, 8),), seed=0)
    assert all(bool((parameter != 0).all()) for parameter in bench.model.parameters())
    assert all(float(output.abs().max()) < 1e3 for _, output in bench._outputs(bench.model))


def test_a_network_that_insists_on_float32_is_tried_in_float32():
    class Insists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc0 = nn.Linear(4, 8)
            self.fc1 = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc1(self.fc0(x @ torch.eye(4)))

    tried = try_cuts(Insists(), chain(4, 8, 3), torch.zeros(1, 4))
    assert _names(tried.groups) == ["fc0"]


def test_tokens_are_drawn_from_those_of_the_example():
    model = nn.Sequential()
    model.add_module("embed", nn.Embedding(5, 6))
    model.add_module("fc", nn.Linear(6, 2))
    members = (Member("embed.weight", 1, index(6), "out"), Member("fc.weight", 1, index(6), "in"))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    graph = Graph((Group("embed", 6, members, (Site("fc", -1, index(6)),)),), (), (), shapes, tuple(shapes), (1, 3))
    assert try_cuts(model, graph, torch.tensor([[1, 4, 2]])) == graph


def test_inputs_that_the_network_does_not_take_are_refused_by_shape():
    with pytest.raises(ValueError, match=r"random inputs of shape \(1, 5, 4, 4\).*Pass example_inputs"):
        try_cuts(mixed(), mixed_graph(), torch.zeros(1, 5, 4, 4))


def test_a_graph_that_is_never_tried_is_refused():
    with pytest.raises(ValueError, match=r"num_trials \(0\)"):
        try_cuts(mixed(), mixed_graph(), IMAGE, num_trials=0)


def test_a_graph_without_groups_needs_no_trial():
    graph = replace(mixed_graph(), groups=())
    assert try_cuts(mixed(), graph, torch.zeros(1, 99)) == graph


def test_guilty_groups_are_found_with_few_cuts(monkeypatch):
    cuts: list[int] = []
    attempt = Bench.attempt
    monkeypatch.setattr(
        Bench, "attempt", lambda self, *args, **kwargs: cuts.append(1) or attempt(self, *args, **kwargs)
    )
    widths = [6] * 33
    graph = chain(*widths)
    graph = _change(graph, "fc20", members=graph.group("fc20").members[:-1])
    model = nn.Sequential()
    for i in range(32):
        model.add_module(f"fc{i}", nn.Linear(6, 6))
    tried = trials.try_cuts(model, graph, torch.zeros(1, 6))
    assert _names(tried.frozen) == ["fc20"]
    assert (
        len(cuts) <= 2 + 5 + 2 + 3
    )  # fails, again as the search begins, log2(31) halvings, explain and check, three that pass
