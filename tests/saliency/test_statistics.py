"""Gate statistics: hand-worked sums, rows kept apart, and networks that have no gates to speak of are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.graph import Graph, Group, Site
from pipeline.models.trace import propagate
from pipeline.pruning.trials import trace
from pipeline.saliency.statistics import GateStatistics, SaliencyError, accumulate, at_stride, by_group
from tests.graphs import Residual, chain, residual_graph


def gates(model: nn.Module, graph: Graph, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """s[n, c] of each group by its definition: the change of a row's loss per unit of a factor on the channel at its consumers."""
    rows = [
        _gates_of_a_row(model, graph, image[None], label[None]) for image, label in zip(images, labels, strict=True)
    ]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _gates_of_a_row(model: nn.Module, graph: Graph, image: Tensor, label: Tensor) -> dict[str, Tensor]:
    factors = {group.name: torch.ones(group.size, dtype=image.dtype, requires_grad=True) for group in graph.groups}

    def scaling(group: Group, site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
        def scale(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            x = args[0].clone()  # some networks write into it afterwards
            axis = site.axis % x.dim()
            values = factors[group.name][:, None].expand_as(site.index_CK)
            full = torch.ones(x.shape[axis], dtype=x.dtype).index_put((site.index_CK.flatten(),), values.flatten())
            return (x * full.reshape([-1 if dim == axis else 1 for dim in range(x.dim())]),)

        return scale

    handles = [
        model.get_submodule(site.module).register_forward_pre_hook(scaling(group, site))
        for group in graph.groups
        for site in group.consumers
    ]
    nn.functional.cross_entropy(model(image), label, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return {name: factor.grad for name, factor in factors.items()}


def test_a_linear_chain_worked_out_by_hand():
    # h = W0 x with W0 the identity; logits = W1 h = (h0, 0). p = softmax. dL/dh0 = p0 - [label = 0], dL/dh1 = 0.
    model = nn.Sequential()
    model.add_module("fc0", nn.Linear(2, 2, bias=False))
    model.add_module("fc1", nn.Linear(2, 2, bias=False))
    model = model.double()
    model.fc0.weight.data = torch.eye(2).double()
    model.fc1.weight.data = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double()
    ln3 = torch.log(torch.tensor(3.0)).double()
    images = torch.stack([torch.stack([ln3, ln3]), torch.stack([ln3, -ln3]), torch.zeros(2).double()])
    labels = torch.tensor([0, 1, 0])
    # Row 0: p0 = 3/4, s = ln 3 * -1/4. Row 1: s = ln 3 * 3/4. Row 2: x = 0, s = 0.
    sums = accumulate(model, chain(2, 2, 2), [(images, labels)], weights=True)
    assert sums["gate_sum/fc0"] == pytest.approx([float(ln3) / 2, 0])
    assert sums["gate_abs/fc0"] == pytest.approx([float(ln3), 0])
    assert sums["gate_square/fc0"] == pytest.approx([float(ln3) ** 2 * 10 / 16, 0])
    assert sums["rows"] == 3
    # The gradient of fc1.weight[0] is sum (p0 - [label = 0]) h: ln 3 * (-1/4 + 3/4) and ln 3 * (-1/4 - 3/4); row 1 is its negative.
    first = torch.tensor([float(ln3) / 2, -float(ln3)]).double()
    assert torch.allclose(sums["grad_sum/fc1.weight"], torch.stack([first, -first]))
    assert torch.allclose(sums["grad_abs/fc1.weight"], torch.stack([first, -first]).abs())
    assert torch.allclose(sums["grad_square/fc1.weight"], torch.stack([first, first]).square())
    assert sums["gate_fourth/fc0"] == pytest.approx([float(ln3) ** 4 * (1 + 81) / 256, 0])


def test_weight_statistics_add_up_over_micro_batches():
    torch.manual_seed(0)
    model = Residual().double().eval()
    images, labels = torch.randn(4, 3, 4, 4).double(), torch.tensor([0, 1, 2, 3])
    parts = [
        accumulate(model, residual_graph(), [(images[i : i + 2], labels[i : i + 2])], weights=True) for i in (0, 2)
    ]
    both = accumulate(model, residual_graph(), [(images[:2], labels[:2]), (images[2:], labels[2:])], weights=True)
    assert all(torch.allclose(both[name], parts[0][name] + parts[1][name]) for name in both)


def test_gates_over_two_consumers_a_depthwise_layer_and_a_flattened_head():
    torch.manual_seed(0)
    model, graph = Residual().double().eval(), residual_graph()
    images, labels = torch.randn(5, 3, 4, 4).double(), torch.tensor([0, 1, 2, 3, 4])
    sums = accumulate(model, graph, [(images[:3], labels[:3]), (images[3:], labels[3:])])
    for name, terms_NC in gates(model, graph, images, labels).items():
        assert torch.allclose(sums[f"gate_sum/{name}"], terms_NC.sum(0))
        assert torch.allclose(sums[f"gate_abs/{name}"], terms_NC.abs().sum(0))
        assert torch.allclose(sums[f"gate_square/{name}"], terms_NC.square().sum(0))


class Twice(nn.Module):
    """One module reads two values of the same group."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) + self.b(self.a(-x).relu())


def test_a_module_that_is_called_twice_adds_both_calls_of_a_row():
    torch.manual_seed(0)
    model = Twice().double()
    graph = trace(model, torch.zeros(2, 3).double())
    images, labels = torch.randn(4, 3).double(), torch.tensor([0, 1, 2, 3])
    sums = accumulate(model, graph, [(images, labels)])
    (terms_NC,) = gates(model, graph, images, labels).values()
    assert torch.allclose(sums[f"gate_abs/{graph.groups[0].name}"], terms_NC.abs().sum(0))


class Multiplies(nn.Module):
    """Multiplies with weights of its own, among other things that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.first, self.second = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        _, h = self.values(x)
        return nn.functional.linear(h, self.second)

    def values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the first and the second weight read."""
        z = self.fc(x * 1.0).relu() + 1
        return z, torch.matmul(z, self.first).sigmoid()


def multiplies() -> tuple[Multiplies, Graph, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Multiplies().double()
    return model, trace(model, torch.zeros(2, 3).double()), torch.randn(6, 3).double(), torch.arange(6) % 5


def test_what_a_module_multiplies_by_itself_is_gated_at_that_call():
    model, graph, images, labels = multiplies()
    assert {group.name: group.consumers[0].call is None for group in graph.groups} == {"fc": False, "first": False}
    sums = accumulate(model, graph, [(images[:4], labels[:4]), (images[4:], labels[4:])])
    z_NC, h_NC = model.values(images)
    # dL/dlogits = p - y; back through the second weight, the sigmoid and the first weight
    grad_h_NC = ((h_NC @ model.second.T).softmax(1) - nn.functional.one_hot(labels, 5)) @ model.second
    grad_z_NC = (grad_h_NC * h_NC * (1 - h_NC)) @ model.first.T
    for name, terms_NC in (("first", h_NC * grad_h_NC), ("fc", z_NC * grad_z_NC)):
        assert torch.allclose(sums[f"gate_sum/{name}"], terms_NC.sum(0))
        assert torch.allclose(sums[f"gate_abs/{name}"], terms_NC.abs().sum(0))
        assert torch.allclose(sums[f"gate_square/{name}"], terms_NC.square().sum(0))


def test_calls_are_counted_alike_whatever_else_is_recorded():
    model, graph, images, labels = multiplies()
    alone = accumulate(model, graph, [(images, labels)])
    more = accumulate(model, graph, [(images, labels)], weights=True, inputs=True)
    assert {name for name in more if name.startswith("input_sum")} == {"input_sum/fc.weight"}
    assert {name for name in more if name.startswith("grad_sum")} == {
        "grad_sum/fc.weight", "grad_sum/first", "grad_sum/second",
    }  # fmt: skip
    assert all(torch.equal(more[name], value) for name, value in alone.items())


def test_hooks_of_such_a_pass_are_gone_afterwards():
    model, graph, images, labels = multiplies()
    accumulate(model, graph, [(images, labels)], inputs=True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class WritesAfterwards(nn.Module):
    """`d` reads h, then h is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.d, self.e = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        u = self.d(h)
        return self.e(u + torch.relu_(h))


def test_an_input_that_is_overwritten_after_its_consumer_is_scored_all_the_same():
    torch.manual_seed(0)
    model = WritesAfterwards().double()
    graph = trace(model, torch.zeros(2, 3).double())
    images, labels = torch.randn(4, 3).double(), torch.tensor([0, 1, 2, 3])
    sums = accumulate(model, graph, [(images, labels)])
    for name, terms_NC in gates(model, graph, images, labels).items():
        assert torch.allclose(sums[f"gate_abs/{name}"], terms_NC.abs().sum(0))


class Folded(nn.Module):
    """Every image becomes four patches in the batch, as windowed attention does it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(2, 6), nn.Linear(6, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.reshape(-1, 2)
        return self.head(self.b(self.a(patches).relu()).reshape(len(x), 4, 2).mean(1))


def test_windows_folded_into_the_batch_belong_to_their_row():
    torch.manual_seed(0)
    model = Folded().double()
    images, labels = torch.randn(5, 8).double(), torch.tensor([0, 1, 2, 0, 1])
    graph = _chain_of(model)
    sums = accumulate(model, graph, [(images, labels)])
    (terms_NC,) = gates(model, graph, images, labels).values()
    assert torch.allclose(sums["gate_abs/a"], terms_NC.abs().sum(0))


def _chain_of(model: nn.Module) -> Graph:
    """The group between `a` and `b`, written by hand."""
    graph = chain(2, 6, 2)
    renamed = graph.to_json().replace("fc0", "a").replace("fc1", "b")
    return Graph.from_json(renamed)


class SequenceFirst(Folded):
    """The same on values of [positions, rows, features]."""

    def forward(self, x: Tensor) -> Tensor:
        positions = x.reshape(len(x), 4, 2).transpose(0, 1)
        return self.head(self.b(self.a(positions).relu()).mean(0))


@pytest.mark.parametrize("num_rows", [2, 3, 4, 5, 8])
def test_rows_that_are_not_the_first_axis_are_refused(num_rows: int):
    torch.manual_seed(0)
    images, labels = torch.randn(num_rows, 8), torch.zeros(num_rows, dtype=torch.int64)
    with pytest.raises(SaliencyError, match=r"group 'a'.*batch-first"):
        accumulate(SequenceFirst(), _chain_of(SequenceFirst()), [(images, labels)])


@pytest.mark.parametrize("seed", range(4))
def test_a_value_that_rounds_to_the_other_side_of_a_relu_is_no_mixing_of_rows(seed: int):
    # Three rows at once and one alone are summed in another order; seed 3 moves a term by more than a percent.
    torch.manual_seed(seed)
    images, labels = torch.randn(3, 3, 64, 64).contiguous(memory_format=torch.channels_last), torch.tensor([0, 1, 2])
    model = timm.create_model("resnet50", num_classes=10).to(memory_format=torch.channels_last)
    task = GateStatistics(model, propagate(model, images[:1]))
    task.to(torch.device("cpu"), torch.channels_last)
    task.check(images, labels)
    assert task(images, labels)["rows"] == 3


class Silent(Folded):
    """The first part runs without gradients."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        def body(y: Tensor) -> Tensor:
            return self.b(self.a(y).relu())

        if self.how == "no_grad":
            with torch.no_grad():
                return self.head(body(x))
        if self.how == "detach":
            return self.head(body(x).detach())
        return self.head(checkpoint(body, x, use_reentrant=True))


@pytest.mark.parametrize("how", ["no_grad", "detach", "checkpoint"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_group_that_no_gradient_reaches_is_refused_and_not_scored_zero(how: str):
    with pytest.raises(SaliencyError, match=r"no gradient reaches any consumer of group 'a'"):
        accumulate(
            Silent(how), _chain_of(Silent(how)), [(torch.randn(3, 2), torch.zeros(3, dtype=torch.int64))], weights=True
        )


def test_the_model_is_left_as_it_was():
    model = Residual()
    model.a.weight.grad = torch.ones_like(model.a.weight)
    model.b.weight.requires_grad_(False)
    model.bn.eval()
    accumulate(model, residual_graph(), [(torch.randn(2, 3, 4, 4), torch.tensor([0, 1]))])
    assert model.training
    assert not model.bn.training
    assert not model.b.weight.requires_grad
    assert torch.equal(model.a.weight.grad, torch.ones_like(model.a.weight))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_half_precision_terms_are_summed_in_float32():
    torch.manual_seed(0)
    model = Residual().eval()
    images, labels = torch.randn(4, 3, 4, 4), torch.tensor([0, 1, 2, 3])
    exact = accumulate(model, residual_graph(), [(images, labels)])
    task = GateStatistics(model.bfloat16(), residual_graph())
    task.to(torch.device("cpu"))
    narrow = by_group(residual_graph(), task(images.bfloat16(), labels))
    for name in ("gate_abs/conv", "gate_abs/a"):
        assert torch.allclose(narrow[name], exact[name], rtol=0.2, atol=0.02)


def test_inputs_are_summed_over_rows_and_positions():
    torch.manual_seed(0)
    model, graph = Residual().double().eval(), residual_graph()
    images, labels = torch.randn(5, 3, 4, 4).double(), torch.tensor([0, 1, 2, 3, 4])
    sums = accumulate(model, graph, [(images[:3], labels[:3]), (images[3:], labels[3:])], inputs=True)
    first = graph.contractions[0].tensor
    assert first == "conv.weight"
    assert torch.allclose(sums[f"input_sum/{first}"], images.sum((0, 2, 3)))
    assert torch.allclose(sums[f"input_square/{first}"], images.square().sum((0, 2, 3)))
    assert sums[f"input_count/{first}"] == 5 * 16
    assert {name for name in sums if name.startswith("input_sum/")} == {
        f"input_sum/{c.tensor}" for c in graph.contractions
    }


def test_groups_share_one_tensor_and_come_apart_by_name():
    graph = chain(2, 2, 3, 1)
    values = {
        "gate_abs": torch.arange(5.0),
        "gate_abs@2": torch.ones(5),
        "rows": torch.tensor(3),
        "rows@2": torch.tensor(2),
    }
    found = by_group(graph, values)
    assert found["gate_abs/fc0"].tolist() == [0, 1]
    assert found["gate_abs/fc1"].tolist() == [2, 3, 4]
    assert {name: value.tolist() for name, value in at_stride(found, 2).items()} == {
        "gate_abs/fc0": [1, 1],
        "gate_abs/fc1": [1, 1, 1],
        "rows": 2,
    }
