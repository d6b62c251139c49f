"""Label propagation: exact groups of small networks worked out by hand, and a reason for all that stays whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.graph import Graph
from pipeline.models.trace import RULES, propagate, rule
from pipeline.pruning.bench import randomise_
from pipeline.pruning.plan import planned
from pipeline.pruning.reference import mask
from pipeline.pruning.surgery import cut
from pipeline.pruning.trials import random_subsets, trace
from tests.graphs import Residual, residual_graph, zeroed
from tests.pruning.networks import mixed, mixed_graph

IMAGE = torch.zeros(1, 3, 8, 8)
EDGES = {"network input", "network output"}


class Net(nn.Module):
    """Layers by name, and what to do with them and the input."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(inputs: int, outputs: int, size: int = 1, **kwargs: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, bias=False, **kwargs)  # type: ignore[arg-type]


def owned(graph: Graph) -> dict[str, dict[str, list[list[int]]]]:
    """Group -> "tensor:dim" -> entries of each channel."""
    return {g.name: {f"{m.tensor}:{m.dim}": m.index_CK.tolist() for m in g.members} for g in graph.groups}


def readers(graph: Graph, name: str) -> dict[str, list[list[int]]]:
    return {f"{site.module}:{site.axis}": site.index_CK.tolist() for site in graph.group(name).consumers}


def singles(*range_: int) -> list[list[int]]:
    return [[c] for c in range(*range_)]


def why(graph: Graph, group: str) -> str:
    """Operation and reason for which `group` stays."""
    found = [f"{f.operation}: {f.reason}" for f in graph.frozen if f.group == group]
    assert found, f"{group} is not among {[f.group for f in graph.frozen]}"
    return "; ".join(found)


def assert_a_cut_equals_zeros(model: nn.Module, graph: Graph, images: Tensor, trials: int = 2) -> None:
    """Cut unequal random parts, and set them to zero in a copy: both must compute the same."""
    generator = torch.Generator().manual_seed(7)
    model = model.double().eval()
    randomise_(model, generator)
    images = torch.randn((3, *images.shape[1:]), generator=generator, dtype=torch.float64)
    for trial in range(trials):
        kept = random_subsets(graph, seed=3, trial=trial)
        small = cut(model, planned(graph, kept))
        with torch.no_grad():
            expected = torch.func.functional_call(model, zeroed(model, graph, kept), (images,))
            torch.testing.assert_close(small(images), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


# --- the kinds of networks that must be understood whole --------------------------------------------------------------


def test_the_channels_between_two_convolutions():
    net = Net(lambda m, x: m.b(m.bn(m.a(x)).relu()), a=conv(3, 4), bn=nn.BatchNorm2d(4), b=nn.Conv2d(4, 2, 1))
    graph = propagate(net, IMAGE)
    bn = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    assert owned(graph) == {"a": {f"{name}:{dim}": singles(4) for name, dim in
                                  [("a.weight", 0), *((name, 0) for name in bn), ("b.weight", 1)]}}  # fmt: skip
    assert [m.role for m in graph.group("a").members] == ["out", *["affine"] * 4, "in"]
    assert readers(graph, "a") == {"b:1": singles(4)}
    assert why(graph, "b") == "network output: these channels are the network's output"
    assert why(graph, "a.input") == "network input: these channels are given by the network's input"
    assert {f.group: f.size for f in graph.frozen} == {"b": 2, "a.input": 3}


@pytest.mark.parametrize(("model", "by_hand"), [(Residual, residual_graph), (mixed, mixed_graph)])
def test_groups_worked_out_by_hand(model, by_hand):
    """Residual, depthwise, squeeze-and-excite, grouped, concatenation, flattening: see the networks."""
    found, expected = propagate(model(), torch.zeros(1, 3, 4, 4)), by_hand()
    assert owned(found) == owned(expected)
    for group in expected.groups:
        assert set(found.group(group.name).consumers) == set(group.consumers)
        assert readers(found, group.name) == readers(expected, group.name)
        roles = {(m.tensor, m.dim): m.role for m in found.group(group.name).members}
        assert roles == {(m.tensor, m.dim): m.role for m in group.members}
    assert set(found.contractions) == set(expected.contractions)
    assert found.shapes == expected.shapes
    assert found.parameters == expected.parameters


def test_dense_connections_keep_one_group_for_each_layer():
    def forward(m: Net, x: Tensor) -> Tensor:
        first = m.a(x)
        second = m.b(first)
        return m.d(m.bn(torch.cat([first, second, m.c(second)], 1)))

    net = Net(forward, a=conv(3, 4), b=conv(4, 5), c=conv(5, 2), bn=nn.BatchNorm2d(11), d=conv(11, 2))
    graph = propagate(net, IMAGE)
    assert {name: (entries["bn.weight:0"], entries["d.weight:1"]) for name, entries in owned(graph).items()} == {
        "a": (singles(4), singles(4)),
        "b": (singles(4, 9), singles(4, 9)),
        "c": (singles(9, 11), singles(9, 11)),
    }
    assert readers(graph, "b") == {"d:1": singles(4, 9), "c:1": singles(5)}


def test_a_grouped_convolution_goes_by_whole_groups():
    net = Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 12, groups=4), c=conv(12, 2))
    graph = propagate(net, IMAGE)
    two, three = torch.arange(8).reshape(4, 2).tolist(), torch.arange(12).reshape(4, 3).tolist()
    assert owned(graph) == {"a": {"a.weight:0": two, "b.weight:0": three, "c.weight:1": three}}
    assert readers(graph, "a") == {"c:1": three}
    assert_a_cut_equals_zeros(net, graph, IMAGE)


def test_a_depthwise_convolution_passes_its_channels_on_also_with_a_multiplier():
    net = Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 4), b=conv(4, 8, 3, groups=4), c=conv(8, 2))
    graph = propagate(net, IMAGE)
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert owned(graph) == {"a": {"a.weight:0": singles(4), "b.weight:0": pairs, "c.weight:1": pairs}}
    assert_a_cut_equals_zeros(net, graph, IMAGE)


def test_a_flattened_channel_owns_all_its_pixels():
    net = Net(lambda m, x: m.fc(m.a(x).flatten(1)), a=conv(3, 4, stride=4), fc=nn.Linear(16, 2))
    graph = propagate(net, IMAGE)
    assert readers(graph, "a") == {"fc:-1": torch.arange(16).reshape(4, 4).tolist()}
    assert owned(graph)["a"]["fc.weight:1"] == torch.arange(16).reshape(4, 4).tolist()


def test_channels_last_flattening_interleaves_them():
    net = Net(lambda m, x: m.fc(m.a(x).permute(0, 2, 3, 1).flatten(1)), a=conv(3, 3, stride=4), fc=nn.Linear(12, 2))
    graph = propagate(net, IMAGE)
    assert readers(graph, "a") == {"fc:-1": torch.arange(12).reshape(4, 3).t().tolist()}
    assert_a_cut_equals_zeros(net, graph, IMAGE)


def test_a_transposed_convolution_reads_dim_0_and_writes_dim_1():
    net = Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 4), b=nn.ConvTranspose2d(4, 5, 2, stride=2), c=conv(5, 2))
    graph = propagate(net, IMAGE)
    assert owned(graph)["a"] == {"a.weight:0": singles(4), "b.weight:0": singles(4)}
    assert owned(graph)["b"] == {"b.weight:1": singles(5), "b.bias:0": singles(5), "c.weight:1": singles(5)}
    assert_a_cut_equals_zeros(net, graph, IMAGE)


def test_halves_of_a_chunk_go_together():
    def forward(m: Net, x: Tensor) -> Tensor:
        value, gate = m.a(x).chunk(2, dim=1)
        return m.b(value * gate.sigmoid())

    net = Net(forward, a=conv(3, 8), b=conv(4, 2))
    graph = propagate(net, IMAGE)
    assert owned(graph) == {"a": {"a.weight:0": [[0, 4], [1, 5], [2, 6], [3, 7]], "b.weight:1": singles(4)}}
    assert_a_cut_equals_zeros(net, graph, IMAGE)


def test_a_channel_shuffle_goes_by_the_same_offset_in_each_group():
    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        n, c, h, w = x.shape
        return m.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))

    net = Net(forward, a=conv(3, 6), b=conv(6, 2))
    graph = propagate(net, IMAGE)
    assert owned(graph) == {"a": {"a.weight:0": [[0, 3], [1, 4], [2, 5]], "b.weight:1": [[0, 1], [2, 3], [4, 5]]}}
    assert_a_cut_equals_zeros(net, graph, IMAGE)


def test_a_pixel_shuffle_ties_the_channels_that_it_weaves():
    net = Net(lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), a=conv(3, 12), b=conv(3, 2))
    graph = propagate(net, IMAGE)
    assert owned(graph)["a"]["a.weight:0"] == torch.arange(12).reshape(3, 4).tolist()
    assert_a_cut_equals_zeros(net, graph, IMAGE)


def test_zeros_padded_to_the_channels_keep_what_meets_them():
    """The shortcut of CIFAR ResNets: the block's channels 2 and 3 meet the stem's, the others meet zeros."""
    net = Net(lambda m, x: m.c(F.pad(m.a(x), (0, 0, 0, 0, 2, 1)) + m.b(x)), a=conv(3, 2), b=conv(3, 5), c=conv(5, 2))
    graph = propagate(net, IMAGE)
    assert owned(graph) == {"a": {"a.weight:0": [[0], [1]], "b.weight:0": [[2], [3]], "c.weight:1": [[2], [3]]}}
    assert why(graph, "b") == "aten::add: the channels meet padding or constants, which stay"
    assert [f.size for f in graph.frozen if f.group == "b"] == [3]
    assert_a_cut_equals_zeros(net, graph, IMAGE)


def test_scales_and_slopes_are_members():
    net = Net(
        lambda m, x: m.b(m.act(m.a(x)) * m.gamma),
        a=conv(3, 4), act=nn.PReLU(4), gamma=nn.Parameter(torch.ones(4, 1, 1)), b=conv(4, 2),
    )  # fmt: skip
    graph = propagate(net, IMAGE)
    assert owned(graph)["a"] == {key: singles(4) for key in ("a.weight:0", "act.weight:0", "gamma:0", "b.weight:1")}


def test_what_does_not_come_from_a_channel_may_join_a_concatenation():
    net = Net(lambda m, x: m.b(torch.cat([x[:, :1], m.a(x)], 1)), a=conv(3, 4), b=conv(5, 2))
    graph = propagate(net, IMAGE)
    assert owned(graph)["a"]["b.weight:1"] == singles(1, 5)
    assert why(graph, "b.input").startswith("network input")


# --- shared weights ---------------------------------------------------------------------------------------------------


def test_a_layer_that_is_called_twice_ties_both_inputs_and_both_outputs():
    net = Net(lambda m, x: m.c(m.twice(m.twice(m.a(x)))), a=conv(3, 4), twice=conv(4, 4), c=conv(4, 2))
    graph = propagate(net, IMAGE)
    members = ("a.weight:0", "twice.weight:0", "twice.weight:1", "c.weight:1")
    assert owned(graph) == {"a": {key: singles(4) for key in members}}
    assert readers(graph, "a") == {"twice:1": singles(4), "c:1": singles(4)}
    assert {c.tensor: c.positions for c in graph.contractions}["twice.weight"] == 2 * 64
    assert_a_cut_equals_zeros(net, graph, IMAGE)


def test_tied_parameters_stand_under_their_first_name():
    net = Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 4), b=conv(4, 4), c=conv(4, 4))
    net.c.weight = net.b.weight
    graph = propagate(net, IMAGE)
    assert owned(graph) == {}  # what b reads is what c reads, and what c writes is the output
    assert "network's output" in why(graph, "a")
    assert graph.parameters == ("a.weight", "b.weight")
    assert graph.shapes["c.weight"] == (4, 4, 1, 1)
    assert {c.tensor: c.positions for c in graph.contractions} == {"a.weight": 64, "b.weight": 128}


# --- what stays whole, and why ----------------------------------------------------------------------------------------


def test_an_unknown_operation_is_a_barrier_with_its_place_and_its_reason():
    net = Net(lambda m, x: m.b(torch.fft.fft(m.a(x), dim=1).real), a=conv(3, 4), b=conv(4, 2))
    graph = propagate(net, IMAGE)
    assert graph.groups == ()
    frozen = {f.group: f for f in graph.frozen}
    assert frozen["a"].operation.startswith("aten::")
    assert frozen["a"].where.startswith("the network (test_trace.py:")
    assert frozen["a"].reason == "there is no rule for this operation"
    assert frozen["b.input"].reason == frozen["a"].reason


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda x: torch.cat([x[:, 3:], x[:, :3]], 1), "taken by their position"),
        (lambda x: torch.cat(x.split(3, dim=1), 1), "taken by their position"),
        (lambda x: x[:, [3, 1, 0, 2]], "picked by their position"),
        (lambda x: x.roll(1, 1), "works along the channels by their position"),
        (lambda x: x.sort(1).values, "works along the channels by their position"),
        (lambda x: x * x.argmax(1, keepdim=True), "the position of a channel is a result"),
        (lambda x: F.avg_pool1d(x.mT, 2).repeat(1, 1, 2).mT, "a window slides over the channels"),
        (lambda x: torch.zeros(1, 4, 64).index_copy(1, torch.arange(4), x), "no rule for this operation"),
    ],
)
def test_operations_that_number_channels_freeze_them(run, reason):
    """A lambda is no method of a module: what it states about sizes cannot be changed in a copy of its own."""
    net = Net(lambda m, x: m.b(run(m.a(x.flatten(2)))), a=nn.Conv1d(3, 4, 1), b=nn.Conv1d(4, 2, 1))
    graph = propagate(net, IMAGE)
    assert graph.groups == ()
    assert reason in why(graph, "a")


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x + x.new_ones(4, 1),
        lambda x: torch.cat([x[:, 2:], x[:, :2]], 1),
        lambda x: x.reshape(-1, 4, 64),
    ],
)
def test_what_may_follow_the_channels_is_left_to_the_trials(run):
    """Each is right where the number is worked out from the shape; here it is a literal, in a lambda that cannot be changed."""
    net = Net(lambda m, x: m.b(run(m.a(x.flatten(2)))), a=nn.Conv1d(3, 4, 1), b=nn.Conv1d(4, 2, 1))
    assert [group.name for group in propagate(net, IMAGE).groups] == ["a"]
    graph = trace(net, IMAGE)
    assert graph.groups == ()
    assert "the cut network" in why(graph, "a")


@pytest.mark.parametrize(
    "run",
    [
        lambda x: F.layer_norm(x.mT, x.shape[1:2]).mT,
        lambda x: F.rms_norm(x.mT, x.shape[1:2]).mT,
        lambda x: F.layer_norm(x, x.shape[1:]),
        lambda x: F.group_norm(x, 1),
        lambda x: x.softmax(1),
        lambda x: x.cumsum(1),
        lambda x: x * x.mean(1, keepdim=True),
        lambda x: x - x.amax((1, 2), keepdim=True),
        lambda x: x / x.norm(dim=1, keepdim=True),
        lambda x: (x @ x.mT) @ x,
        lambda x: F.conv1d(x.mT.flatten(0, 1).unsqueeze(1), x.new_ones(1, 1, 3), padding=1).view(1, 64, -1).mT,
    ],
)
def test_a_statistic_over_the_channels_is_taken_over_those_that_are_kept(run):
    net = Net(lambda m, x: m.b(run(m.a(x.flatten(2)))), a=nn.Conv1d(3, 4, 1), b=nn.Conv1d(4, 2, 1)).double().eval()
    randomise_(net, torch.Generator().manual_seed(0))
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    graph = propagate(net, image)
    assert owned(graph) == {"a": {"a.weight:0": singles(4), "a.bias:0": singles(4), "b.weight:1": singles(4)}}
    without = nn.Conv1d(3, 2, 1), nn.Conv1d(2, 2, 1)  # channels 0 and 2, taken by hand
    hand = Net(lambda m, x: m.b(run(m.a(x.flatten(2)))), a=without[0], b=without[1]).double()
    hand.load_state_dict({"a.weight": net.a.weight[[0, 2]], "a.bias": net.a.bias[[0, 2]],
                          "b.weight": net.b.weight[:, [0, 2]], "b.bias": net.b.bias})  # fmt: skip
    masked = mask(net, planned(graph, {"a": [0, 2]}))(image)
    torch.testing.assert_close(masked, hand(image), rtol=1e-12, atol=1e-12)


def test_spatial_operations_leave_the_channels_free():
    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.interpolate(F.max_pool2d(m.a(x), 2), scale_factor=2)
        x = F.pad(x[:, :, 1:, ::2], (1, 0, 0, 1)).flip(3).roll(1, 2).softmax(3)
        return m.b(x - x.amax((2, 3), keepdim=True) + F.adaptive_avg_pool2d(x, 1))

    net = Net(forward, a=conv(3, 4), b=conv(4, 2))
    graph = propagate(net, IMAGE)
    assert list(owned(graph)) == ["a"]
    assert_a_cut_equals_zeros(net, graph, IMAGE)


def test_writing_into_a_part_of_a_tensor_is_not_followed():
    def forward(m: Net, x: Tensor) -> Tensor:
        room = torch.zeros(1, 4, 8, 8)
        room[:, :2] = m.a(x)
        return m.b(room)

    graph = propagate(Net(forward, a=conv(3, 2), b=conv(4, 2)), IMAGE)
    assert graph.groups == ()
    assert "written into a part" in why(graph, "a")


def test_code_that_decides_by_values_refuses_every_cut():
    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.b(m.a(x))
        return m.c(x if float(x.mean((2, 3))[0, 0]) > 5 else -x)

    graph = propagate(Net(forward, a=conv(3, 4), b=conv(4, 4), c=conv(4, 2)), IMAGE)
    assert graph.groups == ()
    assert "the code decides by computed values" in why(graph, "a")


@pytest.mark.parametrize("way", ["copy", "add", "other view"])
def test_a_decision_by_what_was_written_through_a_view_refuses_every_cut(way: str):
    def forward(m: Net, x: Tensor) -> Tensor:
        room = torch.zeros(1, 4, 12, 12)
        early = room.view(4, 12, 12)
        y = m.b(m.a(x))
        if way == "add":
            room[:, :, 2:10, 2:10].add_(y)
        else:
            room[:, :, 2:10, 2:10] = y
        seen = early if way == "other view" else room
        return m.c(x if float(seen.mean()) > 100 else -x)

    graph = propagate(Net(forward, a=conv(3, 4), b=conv(4, 4), c=conv(3, 2)), IMAGE)
    assert graph.groups == ()
    assert "the code decides by computed values" in why(graph, "a")


def test_a_weight_that_is_used_outside_of_its_layer_is_read_where_it_is_used():
    """The second torch function that the network calls by itself (after relu) multiplies; its first tensor carries them."""
    net = Net(lambda m, x: m.c(F.conv2d(m.a(x).relu(), m.b.weight)), a=conv(3, 4), b=conv(4, 5), c=conv(5, 2))
    graph = propagate(net, IMAGE)
    assert owned(graph)["a"] == {"a.weight:0": singles(4), "b.weight:1": singles(4)}
    (site,) = graph.group("a").consumers
    assert (site.module, site.axis, site.call, site.index_CK.tolist()) == ("", 1, (1, 0, "conv2d"), singles(4))
    assert {c.tensor for c in graph.contractions} == {"a.weight", "b.weight", "c.weight"}


def test_a_computed_weight_keeps_both_its_sides():
    net = Net(lambda m, x: F.conv2d(m.a(x), m.b(x).mean((0, 2, 3)).view(2, 4, 1, 1)), a=conv(3, 4), b=conv(3, 8))
    graph = propagate(net, IMAGE)
    assert graph.groups == ()
    assert "multiplied with computed values" in why(graph, "a")
    assert {f.group for f in graph.frozen} == {"a", "b", "a.input", "b.input"}


def test_channels_that_nothing_reads_are_no_group():
    def forward(m: Net, x: Tensor) -> Tensor:
        m.a(x)
        return m.b(x)

    graph = propagate(Net(forward, a=conv(3, 4), b=conv(3, 2), never=conv(5, 6)), IMAGE)
    assert why(graph, "a") == "no contraction: no convolution or linear layer reads these channels"
    assert why(graph, "never") == "unused: the traced forward does not use it"


def test_a_second_group_of_one_producer_has_a_name_of_its_own():
    net = Net(
        lambda m, x: m.d(m.a(x) * torch.cat([m.b(x), m.c(x)], 1)),
        a=conv(3, 6), b=conv(3, 4), c=conv(3, 2), d=conv(6, 2),
    )  # fmt: skip
    graph = propagate(net, IMAGE)
    assert owned(graph) == {
        "a": {"a.weight:0": singles(4), "b.weight:0": singles(4), "d.weight:1": singles(4)},
        "a#2": {"a.weight:0": singles(4, 6), "c.weight:0": singles(2), "d.weight:1": singles(4, 6)},
    }
    assert_a_cut_equals_zeros(net, graph, IMAGE)


# --- rules of one's own -----------------------------------------------------------------------------------------------


def test_an_operation_of_ones_own_is_understood_once_it_has_a_rule():
    @torch.library.custom_op("tracetest::half", mutates_args=())
    def half(x: Tensor) -> Tensor:
        return x / 2

    net = Net(lambda m, x: m.b(half(m.a(x))), a=conv(3, 4), b=conv(4, 2))
    assert "no rule" in why(propagate(net, IMAGE), "a")
    try:

        @rule("tracetest::half", kind="join")
        def _(trace, call):
            trace.put(call.outputs[0], trace.join(call, [call["x"]]))

        assert list(owned(propagate(net, IMAGE))) == ["a"]
    finally:
        RULES.pop("tracetest::half")


# --- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_positions_are_those_of_one_row(rows):
    net = Net(
        lambda m, x: m.fc(m.t(m.b(m.a(x))).mean(3).mT).mean(1),
        a=conv(3, 4, 3, stride=2), b=conv(4, 4, 3, padding=1, groups=4), t=nn.ConvTranspose2d(4, 4, 2, stride=2),
        fc=nn.Linear(4, 2),
    )  # fmt: skip
    graph = propagate(net, torch.zeros(rows, 3, 9, 9))
    # a: 4 x 4 outputs; b keeps them; t multiplies each of its 16 inputs; fc is applied to 8 image rows
    expected = {"a.weight": 16, "b.weight": 16, "t.weight": 16, "fc.weight": 8}
    assert {c.tensor: c.positions for c in graph.contractions} == expected


# --- manners ----------------------------------------------------------------------------------------------------------


def test_tracing_leaves_the_network_and_the_random_numbers_alone():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mixed()
            self.register_buffer("calls", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return F.dropout(self.body(x), 0.5, training=True)

    model = Counting().train()
    model.body.bn.eval()
    model.body.a.weight.grad = torch.ones_like(model.body.a.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    propagate(model, torch.zeros(1, 3, 4, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert bool((model.body.a.weight.grad == 1).all())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_input_that_does_not_fit_is_refused_and_the_network_left_as_it_was():
    model = mixed().train()
    with pytest.raises(ValueError, match=r"does not run on inputs of shape \(1, 4, 4, 4\)"):
        propagate(model, torch.zeros(1, 4, 4, 4))
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_same_network_gives_the_same_graph_whatever_its_weights_and_its_mode():
    assert propagate(mixed().train(), torch.zeros(1, 3, 4, 4)) == propagate(mixed(), torch.rand(1, 3, 4, 4))


def test_the_graph_of_a_cut_network_is_the_old_one_without_what_went():
    model, image = mixed(), torch.zeros(1, 3, 4, 4)
    graph = propagate(model, image)
    kept = random_subsets(graph, seed=0)
    again = propagate(cut(model, planned(graph, kept)), image)
    assert {g.name: g.size for g in again.groups} == {name: len(channels) for name, channels in kept.items()}


# --- timm -------------------------------------------------------------------------------------------------------------

FAST = {
    "resnet18": 12, "resnet26d": 23, "seresnet18": 20, "resnext26ts": None, "regnetx_002": 18, "regnety_002": 31,
    "mobilenetv1_100": 14, "mobilenetv2_050": 25, "mobilenetv3_small_050": 26, "mobilenetv4_conv_small_050": 21,
    "tf_efficientnet_lite0": 24, "efficientnet_b0": 40, "test_efficientnet": None,
}  # fmt: skip
"""Model -> number of groups; None: not counted by hand."""
SLOW = [
    "resnet50", "resnet50s", "resnet152", "resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2",
    "seresnet50", "regnetx_032", "regnety_016", "mobilenetv3_large_100", "mobilenetv4_conv_medium",
    "tf_efficientnet_lite4", "tf_efficientnet_b0", "tf_efficientnetv2_b0", "efficientnetv2_rw_t", "densenet121",
    "densenet169", "vgg11_bn", "vgg16_bn",
]  # fmt: skip


def _check_timm(name: str, num_groups: int | None) -> None:
    model, image = timm.create_model(name, num_classes=4).eval(), torch.zeros(1, 3, 32, 32)
    graph = propagate(model, image)
    assert {f.operation for f in graph.frozen} == EDGES
    assert num_groups is None or len(graph.groups) == num_groups
    in_groups = {member.tensor for group in graph.groups for member in group.members}
    assert set(graph.parameters) - in_groups <= {graph.parameters[-1]}  # the classifier's bias
    assert_a_cut_equals_zeros(model, graph, image, trials=1)


@pytest.mark.parametrize("name", FAST)
def test_convolutional_timm_models_are_understood_whole(name):
    _check_timm(name, FAST[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_large_convolutional_timm_models_are_understood_whole(name):
    _check_timm(name, None)


def test_a_resnet18_has_four_streams_and_the_inside_of_eight_blocks():
    graph = propagate(timm.create_model("resnet18"), torch.zeros(1, 3, 32, 32))
    streams = {"conv1": 64, "layer2.0.conv2": 128, "layer3.0.conv2": 256, "layer4.0.conv2": 512}
    inside = {f"layer{i}.{j}.conv1": 32 * 2**i for i in range(1, 5) for j in range(2)}
    assert {group.name: group.size for group in graph.groups} == streams | inside
    positions = {contraction.tensor: contraction.positions for contraction in graph.contractions}
    assert (positions["conv1.weight"], positions["layer4.1.conv2.weight"], positions["fc.weight"]) == (256, 1, 1)


def test_a_vision_transformer_is_understood_whole():
    """Its stream through all norms, the heads and the inside of the MLP of each of six blocks."""
    model, image = timm.create_model("test_vit"), torch.zeros(1, 3, 160, 160)
    graph = propagate(model, image)
    heads = {f"blocks.{i}.attn.qkv": 2 for i in range(6)}
    inside = {f"blocks.{i}.mlp.fc1": 192 for i in range(6)}
    assert {group.name: group.size for group in graph.groups} == {"patch_embed.proj": 64, **heads, **inside}
    assert {f.operation for f in graph.frozen} == EDGES
    qkv = graph.group("blocks.0.attn.qkv")
    first_head = [[*range(32), *range(64, 96), *range(128, 160)], list(range(32))]
    assert [m.index_CK[0].tolist() for m in qkv.members] == [first_head[0], first_head[0], first_head[1]]
    assert [(m.tensor.removeprefix("blocks.0.attn."), m.dim) for m in qkv.members] == [
        ("qkv.weight", 0), ("qkv.bias", 0), ("proj.weight", 1),
    ]  # fmt: skip
    assert {(s.attribute, s.text) for s in graph.sizes if s.module == "blocks.0.attn"} == {
        ("num_heads", "self.num_heads"), ("attn_dim", "self.attn_dim"),
    }  # fmt: skip
    kept = random_subsets(graph, seed=0)
    small = cut(model, planned(graph, kept))
    assert small.blocks[0].attn.num_heads == len(kept["blocks.0.attn.qkv"]) == 1


def test_a_blur_filter_that_is_no_part_of_the_state_follows_its_channels():
    model, image = timm.create_model("resnetblur18", num_classes=4).eval(), torch.zeros(1, 3, 32, 32)
    graph = propagate(model, image)
    assert {f.operation for f in graph.frozen} == EDGES


# --- the table of rules -----------------------------------------------------------------------------------------------


def test_the_documentation_lists_every_rule():
    """`python -m tests.models.test_trace` writes the table anew."""
    assert rules_table() in DOCUMENT.read_text()


DOCUMENT = Path(__file__).parents[2] / "docs" / "tracing.md"


def rules_table() -> str:
    """Kind -> operations, as a Markdown table."""
    kinds: dict[str, list[str]] = {}
    for name, one in RULES.items():
        if name.startswith("aten::"):
            kinds.setdefault(one.kind, []).append(f"`{name.removeprefix('aten::')}`")
    rows = [f"| {kind} | {', '.join(sorted(names))} |" for kind, names in sorted(kinds.items())]
    return "\n".join(["| kind | operations |", "|---|---|", *rows])


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text().partition("<!-- rules -->")
    _, _, after = rest.partition("<!-- end of rules -->")
    DOCUMENT.write_text(f"{before}<!-- rules -->\n{rules_table()}\n<!-- end of rules -->{after}")
