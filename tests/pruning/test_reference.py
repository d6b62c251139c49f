"""The masked reference: what a cut has to compute, by values worked out by hand for each way in which channels meet."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close

from pipeline.models.standalone import open_attention_
from pipeline.models.trace import propagate
from pipeline.pruning.plan import planned
from pipeline.pruning.reference import mask
from pipeline.pruning.surgery import PlanMismatch, named_tensors
from tests.graphs import chain
from tests.pruning.networks import mixed, mixed_graph

LN3 = math.log(3)


class Between(nn.Module):
    """Identity, something between, identity: the output is what the second layer reads."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc0, self.fc1 = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.run = run
        for layer in (self.fc0, self.fc1):
            nn.init.eye_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(self.run(self.fc0(x)))


def read_without_the_middle_one(run: Callable[[Tensor], Tensor], *values: float) -> list[float]:
    """What the second layer of `Between` reads of these three channels when the middle one is removed."""
    model = Between(run)
    plan = planned(propagate(model, torch.ones(1, 3)), {"fc0": [0, 2]})
    (row,) = mask(model, plan)(torch.tensor([values], dtype=torch.float32))
    return row.tolist()


# --- what mixes no channels -------------------------------------------------------------------------------------------


def test_a_contraction_reads_zeros_where_channels_are_removed():
    model = nn.Sequential()
    model.add_module("fc0", nn.Linear(1, 3))
    model.add_module("fc1", nn.Linear(3, 2))
    model.fc0.weight.data = torch.tensor([[1.0], [2.0], [3.0]])
    model.fc0.bias.data = torch.tensor([10.0, 20.0, 30.0])
    model.fc1.weight.data = torch.tensor([[1.0, 100.0, 2.0], [3.0, 100.0, 4.0]])
    model.fc1.bias.data = torch.tensor([0.5, 0.25])
    masked = mask(model, planned(chain(1, 3, 2), {"fc0": [0, 2]}))
    # x = 1: the channels are 11, -, 33
    assert masked(torch.ones(1, 1)).tolist() == [[11 + 66 + 0.5, 33 + 132 + 0.25]]


def test_what_a_sigmoid_makes_of_a_removed_channel_is_not_seen():
    assert read_without_the_middle_one(torch.sigmoid, 0.0, 0.0, LN3) == pytest.approx([0.5, 0, 0.75])


# --- statistics over channels -----------------------------------------------------------------------------------------


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (3,), eps=0.0)


@pytest.mark.parametrize(
    ("run", "values", "expected"),
    [
        (norm, (1, 100, 3), (-1, 0, 1)),
        (lambda x: F.rms_norm(x, (3,), eps=0.0), (3, 100, 4), (3 / math.sqrt(12.5), 0, 4 / math.sqrt(12.5))),
        (lambda x: F.group_norm(x, 1, eps=0.0), (1, 100, 3), (-1, 0, 1)),
        (lambda x: x.softmax(-1), (0, 100, LN3), (0.25, 0, 0.75)),
        (lambda x: x.log_softmax(-1), (0, 100, LN3), (math.log(0.25), 0, math.log(0.75))),
        (lambda x: x - x.mean(-1, keepdim=True), (1, 100, 3), (-1, 0, 1)),
        (lambda x: x / x.sum(-1, keepdim=True), (1, 100, 3), (0.25, 0, 0.75)),
        (lambda x: x / x.amax(-1, keepdim=True), (1, 100, 4), (0.25, 0, 1)),
        (lambda x: x / x.norm(dim=-1, keepdim=True), (3, 100, 4), (0.6, 0, 0.8)),
        (lambda x: x.cumsum(-1), (1, 100, 3), (1, 0, 4)),
        (lambda x: (x * 1).cumsum_(-1), (1, 100, 3), (1, 0, 4)),
        (lambda x: norm(norm(x) + 5) * x, (1, 100, 3), (-1, 0, 3)),
    ],
    ids=["layer_norm", "rms_norm", "group_norm", "softmax", "log_softmax", "mean", "sum", "amax", "length", "cumsum",
         "in place", "one after another"],
)  # fmt: skip
def test_a_statistic_over_channels_is_taken_over_those_that_are_kept(run, values, expected):
    assert read_without_the_middle_one(run, *values) == pytest.approx(expected, abs=1e-5)


def test_scale_and_shift_of_a_norm_stay_with_their_channels():
    layer = nn.LayerNorm(3, eps=0.0)
    layer.weight.data, layer.bias.data = torch.tensor([2.0, 9.0, 3.0]), torch.tensor([0.5, 9.0, 0.25])
    model = Between(layer)
    plan = planned(propagate(model, torch.ones(1, 3)), {"fc0": [0, 2]})
    assert_close(mask(model, plan)(torch.tensor([[1.0, 100.0, 3.0]])), torch.tensor([[-1.5, 0, 3.25]]))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weight_norm_is_taken_over_what_a_row_still_reads():
    model = Between(nn.Identity())
    model.fc1 = weight_norm(nn.Linear(3, 1, bias=False))
    model.fc1.parametrizations.weight.original0.data = torch.tensor([[10.0]])
    model.fc1.parametrizations.weight.original1.data = torch.tensor([[3.0, 100.0, 4.0]])
    plan = planned(propagate(model, torch.ones(1, 3)), {"fc0": [0, 2]})
    assert mask(model, plan)(torch.ones(1, 3)).item() == pytest.approx(6 + 8)


def test_removed_rows_of_a_normalised_weight_are_zeros():
    model = Between(nn.Identity())
    model.fc0 = weight_norm(model.fc0)
    graph = propagate(model, torch.ones(1, 3))
    (group,) = graph.groups
    plan = planned(graph, {group.name: [0, 2]})
    assert_close(mask(model, plan)(torch.tensor([[5.0, 6.0, 7.0]])), torch.tensor([[5.0, 0.0, 7.0]]))


class Tied(nn.Module):
    """A token table that is the classifier, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(2, 3)
        self.head = nn.Linear(3, 2, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


def test_channels_of_a_tied_weight_are_removed_where_it_writes_and_where_it_reads():
    model = Tied()
    model.embed.weight.data = torch.tensor([[1.0, 100.0, 2.0], [3.0, 100.0, 4.0]])
    graph = propagate(model, torch.tensor([[0]]))
    plan = planned(graph, {graph.groups[0].name: [0, 2]})
    assert mask(model, plan)(torch.tensor([[0, 1]])).tolist() == [[[1 + 4, 3 + 8], [3 + 8, 9 + 16]]]


class Heads(nn.Module):
    """Two heads of one channel: the first looks at all alike, the second at the larger value."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.attention = nn.Linear(2, 2, bias=False), nn.MultiheadAttention(2, 2, batch_first=True)
        nn.init.eye_(self.fc.weight)
        one, none = torch.eye(2), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
        self.attention.in_proj_weight.data = torch.cat([none, none, one])
        self.attention.out_proj.weight.data = one.clone()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.fc(x)
        return self.attention(x, x, x)


def test_a_head_is_removed_whole_and_the_others_alone_make_the_mean_of_the_weights():
    model = open_attention_(Heads())
    graph = propagate(model, torch.ones(1, 2, 2))
    (name,) = (group.name for group in graph.groups if group.name.startswith("attention"))
    x = torch.tensor([[[1.0, 10.0], [3.0, 30.0]]])
    out, weights = mask(model, planned(graph, {name: [0]}))(x)
    assert_close(out, torch.tensor([[[2.0, 0.0], [2.0, 0.0]]]))
    assert_close(weights, torch.full((1, 2, 2), 0.5))
    _, of_both = model(x)
    assert_close(of_both, torch.tensor([[[0.25, 0.75], [0.25, 0.75]]]))  # the second head sees the second row alone


# --- manners ----------------------------------------------------------------------------------------------------------


def test_nothing_that_removed_channels_hold_reaches_the_output():
    model, plan = mixed(), planned(mixed_graph(), {"stem": [0, 5], "a": [2, 3], "e": [1], "h": [3]})
    images = torch.randn(2, 3, 4, 4)
    expected = mask(model, plan)(images)
    tensors = dict(named_tensors(model))
    for group in plan.groups:
        removed = torch.tensor(group.removed, dtype=torch.int64)
        for member in group.members:
            tensors[member.tensor].data.index_fill_(member.dim, member.index_CK[removed].reshape(-1), 3.0)
    assert torch.equal(mask(model, plan)(images), expected)


def test_a_plan_that_removes_nothing_gives_the_dense_network():
    model, images = mixed(), torch.randn(2, 3, 4, 4)
    assert torch.equal(mask(model, planned(mixed_graph(), {}))(images), model(images))


def test_the_dense_network_is_run_itself_and_stays_as_it_is():
    model, images = mixed(), torch.randn(2, 3, 4, 4)
    before, expected = {name: tensor.clone() for name, tensor in named_tensors(model)}, model(images)
    masked = mask(model, planned(mixed_graph(), {"stem": [0], "a": [1, 2]}))
    assert masked.model is model
    assert not torch.equal(masked(images), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(model))
    assert torch.equal(model(images), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_each_row_is_computed_as_if_it_were_alone():
    model = Between(nn.LayerNorm(3))
    masked = mask(model, planned(propagate(model, torch.ones(1, 3)), {"fc0": [0, 2]}))
    rows = torch.randn(5, 3)
    assert_close(masked(rows), torch.cat([masked(row[None]) for row in rows]))


def test_what_the_network_writes_into_its_values_leaves_the_input_alone():
    x = torch.tensor([[1.0, 100.0, 3.0]])
    model = Between(lambda h: h.sub_(h.mean(-1, keepdim=True)))
    masked = mask(model, planned(propagate(model, torch.ones(1, 3)), {"fc0": [0, 2]}))
    assert masked(x).tolist() == [[-1, 0, 1]]
    assert x.tolist() == [[1, 100, 3]]


def test_mask_refuses_a_plan_for_another_network():
    with pytest.raises(PlanMismatch, match=r"stem\.weight"):
        mask(mixed(width=10), planned(mixed_graph(), {"stem": [0]}))
