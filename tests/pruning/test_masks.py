"""Masks: the bits of a packed mask, and the file."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifacts import StorageError
from pipeline.pruning.masks import (
    BrokenMasks,
    channel_masks,
    load_masks,
    masks_sha256,
    pack,
    save_masks,
    unpack,
)
from pipeline.pruning.plan import planned
from tests.graphs import chain

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def _random_mask(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


# --- bits -----------------------------------------------------------------------------------------------------------


def test_channel_masks_of_a_plan():
    masks = channel_masks(planned(chain(2, 3, 4, 2), {"fc0": [0, 2]}))
    assert {name: mask.tolist() for name, mask in masks.items()} == {"fc0": [True, False, True], "fc1": [True] * 4}


def test_element_i_is_bit_i_of_the_bytes():
    keep = torch.tensor([True, False, True, True, False, False, False, False, True])
    assert pack(keep).tolist() == [0b00001101, 0b1]
    assert pack(keep.reshape(3, 3)).tolist() == [13, 1]


@given(SHAPES, st.integers(0, 1000))
def test_packing_undoes_itself_for_any_shape(shape, seed):
    keep = _random_mask(shape, seed)
    assert torch.equal(unpack(pack(keep), shape), keep)
    assert pack(keep).numel() == -(-keep.numel() // 8)


def test_packing_reads_a_transposed_mask_in_its_own_order():
    keep = _random_mask((5, 7)).t()
    assert torch.equal(unpack(pack(keep), (7, 5)), keep)


def test_bytes_that_do_not_fit_the_shape_and_other_types_are_refused():
    with pytest.raises(ValueError, match=r"shape \[17\] is packed into uint8 \[3\], got torch.uint8 \[2\]"):
        unpack(torch.zeros(2, dtype=torch.uint8), (17,))
    with pytest.raises(ValueError, match=r"a mask is bool \(True = keep\), got torch.float32"):
        pack(torch.ones(3))


# --- the hash -------------------------------------------------------------------------------------------------------


def test_the_hash_is_of_names_shapes_and_bits_and_nothing_else():
    keep = _random_mask((4, 6))
    masks = {"b": keep, "a": ~keep}
    same = {"a": ~keep, "b": keep.clone(memory_format=torch.contiguous_format)}
    assert masks_sha256(masks) == masks_sha256(same)
    flipped = keep.clone()
    flipped[3, 5] = ~flipped[3, 5]
    others = [{"b": flipped, "a": ~keep}, {"c": keep, "a": ~keep}, {"b": keep.reshape(6, 4), "a": ~keep}, {"b": keep}]
    assert len({masks_sha256(other) for other in [masks, *others]}) == 5


def test_the_hash_is_the_same_in_every_version():
    masks = {"conv": torch.tensor([True, False, True])}
    assert masks_sha256(masks) == "d0200e212c20e0179825b909a1b027d30f6290b502d6b17f252a3ed237809552"


# --- the file -------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda t: t != "__metadata__"), SHAPES, max_size=3))
def test_masks_come_back_from_the_file(tmp_path_factory, shapes):
    path = str(tmp_path_factory.mktemp("masks") / "masks.safetensors")
    masks = {name: _random_mask(shape) for name, shape in shapes.items()}
    assert save_masks(path, masks) == masks_sha256(masks)
    loaded = load_masks(path)
    assert {n: m.tolist() for n, m in loaded.items()} == {n: m.tolist() for n, m in masks.items()}
    assert {n: m.shape for n, m in loaded.items()} == {n: m.shape for n, m in masks.items()}


def test_the_same_masks_give_the_same_bytes(tmp_path):
    masks = {name: _random_mask((9, 3), i) for i, name in enumerate(["w", "v", "u", "t"])}
    save_masks(str(tmp_path / "a"), masks)
    save_masks(str(tmp_path / "b"), dict(reversed(masks.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_mask_takes_a_bit_per_weight(tmp_path):
    save_masks(str(tmp_path / "m"), {"weight": _random_mask((1000, 800))})
    assert (tmp_path / "m").stat().st_size < 800_000 / 8 + 1000


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path = tmp_path / "m"
    save_masks(str(path), {"weight": _random_mask((40, 8))})
    data = path.read_bytes()
    for length in (0, 4, 8, 30, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(BrokenMasks, match="no whole mask file"):
            load_masks(str(path))


def test_an_altered_bit_is_found(tmp_path):
    path = tmp_path / "m"
    save_masks(str(path), {"weight": _random_mask((40, 8))})
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BrokenMasks, match="sha256"):
        load_masks(str(path))


def test_a_safetensors_file_of_something_else_is_no_mask_file(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "m", {"masks": json.dumps({"format": "x/9"})})
    with pytest.raises(BrokenMasks, match="format is 'x/9'"):
        load_masks(str(tmp_path / "m"))


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(StorageError):
        load_masks(str(tmp_path / "none"))
