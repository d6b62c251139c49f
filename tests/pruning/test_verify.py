"""Verification: hand-worked differences, and that nothing which is not a proof passes for one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from pipeline.pruning.verify import CutMismatch, Difference, output_tensors, verify


class Scale(nn.Module):
    """Multiplies by a number, and drops out half while training."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x * self.factor)


ROWS = torch.tensor([[1.0, -4.0], [2.0, 0.5]])


def test_difference_of_a_hand_worked_pair():
    # 2.5 x against 2 x: the largest difference is 0.5 * 4, the largest reference value 2 * 4
    assert verify(Scale(2.5), Scale(2.0), ROWS) == Difference(max_abs=2.0, max_rel=0.25, rows=2)


def test_equal_networks_do_not_differ_even_if_they_drop_out_while_training():
    cut, masked = Scale(2.0).train(), Scale(2.0).train()
    masked.drop.eval()
    assert verify(cut, masked, ROWS) == Difference(0.0, 0.0, 2)
    assert (cut.training, cut.drop.training, masked.training, masked.drop.training) == (True, True, True, False)


def test_modes_come_back_when_a_network_stops():
    class Stops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("stop")

    model = Stops().train()
    with pytest.raises(RuntimeError, match="stop"):
        verify(model, Scale(1.0), ROWS)
    assert model.training


def test_require_returns_what_is_small_enough_and_names_both_numbers_of_what_is_not():
    assert Difference(0.1, 1e-5, 8).require() == Difference(0.1, 1e-5, 8)
    with pytest.raises(
        CutMismatch, match=r"8 rows: max_abs 0\.123, max_rel 0\.00457, allowed 0\.0001.*Trace the network"
    ):
        Difference(0.123, 0.00457, 8).require()
    with pytest.raises(CutMismatch):
        Difference(0.1, 1e-5, 8).require(tolerance=1e-6)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_what_is_not_a_number_never_passes(factor):
    with pytest.raises(CutMismatch):
        verify(Scale(factor), Scale(2.0), ROWS).require()
    with pytest.raises(CutMismatch):
        verify(Scale(factor), Scale(factor), ROWS).require()


def test_an_all_zero_reference_allows_no_difference():
    assert verify(Scale(0.0), Scale(0.0), ROWS).max_rel == 0.0
    with pytest.raises(CutMismatch, match="max_rel inf"):
        verify(Scale(1e-12), Scale(0.0), ROWS).require()


def test_an_empty_batch_proves_nothing():
    with pytest.raises(ValueError, match="at least one row"):
        verify(Scale(1.0), Scale(1.0), torch.zeros(0, 2))


def test_outputs_of_another_shape_or_number_differ():
    with pytest.raises(CutMismatch, match=r"\[\(2, 1\)\], the dense one's \[\(2, 2\)\]"):
        verify(nn.Linear(2, 1), nn.Linear(2, 2), ROWS)


def test_every_output_counts_and_the_worst_decides():
    class Two(nn.Module):
        def __init__(self, second: float) -> None:
            super().__init__()
            self.second = second

        def forward(self, x: Tensor) -> dict[str, object]:
            return {"large": x * 1e6, "small": (x * self.second,)}

    difference = verify(Two(1.5), Two(1.0), ROWS)
    assert (difference.max_abs, difference.max_rel) == (2.0, 0.5)


def test_outputs_are_found_in_nested_containers():
    @dataclass
    class Output:
        logits: Tensor
        loss: None
        hidden: tuple[Tensor, ...]

    output = [Output(torch.tensor(1), None, (torch.tensor(2), torch.tensor(3))), {"a": torch.tensor(4)}, "text"]
    assert [int(tensor) for tensor in output_tensors(output)] == [1, 2, 3, 4]


def test_no_gradient_is_kept():
    model = Scale(2.0)
    verify(model, Scale(2.0), ROWS.requires_grad_(True))
    assert model.factor.grad is None
