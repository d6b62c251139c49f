"""Tensors without their zeros: smaller as worked out by hand, and back bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.export.packing import HEADER_BYTES, num_bytes, packed
from pipeline.models.standalone import unpacked


def there_and_back(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    stored, shapes = packed(tensors)
    back = unpacked(stored, shapes)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert (back[name].shape, back[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(*[t.reshape(-1).view(torch.uint8) for t in (back[name], tensor)])
    return shapes


def sparse(numel: int, num_values: int, dtype: torch.dtype = torch.float32) -> Tensor:
    tensor = torch.zeros(numel, dtype=dtype)
    tensor[torch.randperm(numel, generator=torch.Generator().manual_seed(0))[:num_values]] = 3
    return tensor


def test_values_and_bits_of_a_hand_worked_tensor():
    tensor = torch.zeros(100, 10)
    tensor[0, 3], tensor[1, 0], tensor[99, 9] = 5.0, -2.0, 7.0
    stored, shapes = packed({"w": tensor})
    assert shapes == {"w": [100, 10]}
    assert stored["w:values"].tolist() == [5.0, -2.0, 7.0]
    # element 3 is bit 3 of byte 0, element 10 bit 2 of byte 1, element 999 bit 7 of byte 124
    assert {i: v for i, v in enumerate(stored["w:places"].tolist()) if v} == {0: 8, 1: 4, 124: 128}


def test_a_tensor_with_nine_zeros_of_ten_takes_half_a_byte_and_a_bit_for_each_weight():
    stored, _ = packed({"w": sparse(80_000, 8_000)})
    assert num_bytes(stored) == 80_000 * (0.1 * 4 + 1 / 8)


@pytest.mark.parametrize(
    ("numel", "num_values", "apart"),
    [
        (8000, 7318, True),  # 4 * 7318 + 1000 + 128 = 30,400 of 32,000 bytes
        (8000, 7319, False),
        (20, 0, False),  # 80 bytes are less than a second name
        (0, 0, False),
    ],
)
def test_only_what_saves_a_twentieth_is_taken_apart(numel: int, num_values: int, apart: bool):
    assert HEADER_BYTES == 128
    assert bool(there_and_back({"w": sparse(numel, num_values)})) == apart


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_every_dtype_comes_back(dtype: torch.dtype):
    tensors = {"w": sparse(4099, 40, dtype).reshape(4099, 1, 1), "whole": torch.ones(3, dtype=dtype)}
    assert there_and_back(tensors) == {"w": [4099, 1, 1]}


def test_negative_zero_and_every_kind_of_nan_are_values():
    tensor = torch.zeros(4096)
    bits = tensor.view(torch.int32)
    odd = [
        -(2**31),
        0x7FC00000,
        0x7FC00001,
        0x7F800001,
        -1,
        1,
    ]  # -0.0, quiet NaNs, a signalling one, a negative one, a subnormal
    bits[7 : 7 + len(odd)] = torch.tensor(odd, dtype=torch.int32)
    assert there_and_back({"w": tensor}) == {"w": [4096]}
    assert packed({"w": tensor})[0]["w:values"].view(torch.int32).tolist() == odd


def test_a_tensor_whose_parts_have_the_name_of_another_stays_whole():
    assert there_and_back({"w": sparse(4096, 4), "w:places": torch.ones(2)}) == {}
