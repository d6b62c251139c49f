"""Selection: the k-th largest equals a full sort, bit for bit, whatever the signs, ties, zeros and subnormals."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.pruning import selection
from pipeline.pruning.selection import Selection, global_masks, kth_score

UNSIGNED = {
    torch.float16: torch.uint16,
    torch.bfloat16: torch.uint16,
    torch.float32: torch.uint32,
    torch.float64: torch.uint64,
}
DTYPES = list(UNSIGNED)


def _special_bits(dtype: torch.dtype) -> list[int]:
    """Zero, the smallest subnormal and normal, 1 and its neighbours, the largest number; and all of them negative."""
    info = torch.finfo(dtype)
    values = torch.tensor([0.0, info.smallest_normal, 1.0, info.max], dtype=dtype)
    zero, normal, one, largest = (int(bits) for bits in values.view(UNSIGNED[dtype]).numpy())
    sign = 1 << (info.bits - 1)
    positive = [zero, 1, normal - 1, normal, one - 1, one, one + 1, largest - 1, largest]
    return positive + [bits | sign for bits in positive]


@st.composite
def shard_sets(draw: st.DrawFn) -> tuple[dict[str, Tensor], int, int]:
    """Named shards of one float type, how many scores to keep, and the bytes of a piece."""
    dtype = draw(st.sampled_from(DTYPES))
    infinity = int(torch.tensor([torch.inf], dtype=dtype).view(UNSIGNED[dtype]).numpy()[0])
    anything = st.integers(0, (1 << torch.finfo(dtype).bits) - 1).filter(lambda bits: bits & infinity != infinity)
    scores = st.one_of(st.sampled_from(_special_bits(dtype)), anything)
    names = draw(st.lists(st.sampled_from(["a", "b", "b.weight", "c10", "c9"]), unique=True, min_size=1))
    shards = {}
    for name in names:
        bits = np.array(draw(st.lists(scores, max_size=12)), dtype=f"uint{torch.finfo(dtype).bits}")
        shards[name] = torch.from_numpy(bits).view(dtype)
    total = sum(shard.numel() for shard in shards.values())
    return shards, draw(st.integers(0, total)), draw(st.sampled_from([8, 24, 1 << 20]))


@given(shard_sets())
def test_masks_equal_a_full_sort_by_score_name_and_index(case):
    shards, num_keep, piece_bytes = case
    ranked = sorted((-v, name, i) for name, shard in shards.items() for i, v in enumerate(shard.tolist()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "PIECE_BYTES", piece_bytes)
        masks = global_masks(shards, num_keep)
    assert list(masks) == list(shards)
    chosen = {(name, i) for name, mask in masks.items() for i in mask.nonzero().reshape(-1).tolist()}
    assert chosen == {(name, i) for _, name, i in ranked[:num_keep]}


@given(shard_sets())
def test_threshold_and_ties_equal_a_full_sort(case):
    shards, k, piece_bytes = case
    if k == 0:
        return
    scores = torch.cat(list(shards.values())).sort(descending=True).values
    line = scores[k - 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "PIECE_BYTES", piece_bytes)
        found = kth_score(shards.values, k)
    above = int((scores > line).sum())
    assert found == Selection(line.item(), above, int((scores == line).sum()), k - above)


def test_ties_by_hand():
    shards = {"b": torch.tensor([2.0, 1.0, 2.0]), "a": torch.tensor([2.0, 5.0])}
    masks = global_masks(shards, 3)
    # 5 is kept; of the three 2s, "a" comes before "b" and index 0 before 2.
    assert masks["a"].tolist() == [True, True]
    assert masks["b"].tolist() == [True, False, False]
    assert kth_score(shards.values, 3) == Selection(2.0, num_above=1, num_ties=3, num_ties_kept=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_scores_by_hand(dtype):
    epsilon = torch.finfo(dtype).eps
    # In order 3, 0.5, -1, -1 - eps, -1 - 2 eps, -4: the middle three share all leading bits, if there are others.
    shards = {"v": torch.tensor([-1 - epsilon, 3, -4], dtype=dtype)}
    shards["w"] = torch.tensor([-1 - 2 * epsilon, 0.5, -1], dtype=dtype)
    found = [kth_score(shards.values, k).threshold for k in range(1, 7)]
    assert found == [3, 0.5, -1, -1 - epsilon, -1 - 2 * epsilon, -4]
    masks = global_masks(shards, 4)
    assert masks["v"].tolist() == [True, True, False]
    assert masks["w"].tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_extremes_of_each_type_are_in_order(dtype):
    bits = np.array(_special_bits(dtype), dtype=f"uint{torch.finfo(dtype).bits}")
    scores = torch.from_numpy(bits).view(dtype)
    found = [kth_score(lambda: [scores], k).threshold for k in range(1, len(scores) + 1)]
    assert found == sorted(scores.tolist(), reverse=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [2, 3, 4])
def test_zeros_of_both_signs_are_equal(dtype, k):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    scores = torch.tensor([-smallest, -0.0, 0.0, smallest, -0.0], dtype=dtype)
    found = kth_score(lambda: [scores], k)
    assert found == Selection(0.0, num_above=1, num_ties=3, num_ties_kept=k - 1)
    assert str(found.threshold) == "0.0"
    assert global_masks({"w": scores}, k)["w"].tolist() == [False, True, k > 2, True, k > 3]


@pytest.mark.parametrize(
    ("dtype", "passes"), [(torch.float16, 1), (torch.bfloat16, 1), (torch.float32, 2), (torch.float64, 4)]
)
def test_scores_are_read_once_per_16_bits_zeros_of_one_sign_among_them(dtype, passes):
    for values in ([0.0, 0.0, 1.0], [-0.0, -0.0, -1.0]):
        reads = []

        def shards(values=values, reads=reads):
            reads.append(1)
            return [torch.tensor(values, dtype=dtype)]

        assert kth_score(shards, 2).threshold == 0
        assert len(reads) == passes


def test_shards_longer_than_a_piece(monkeypatch):
    monkeypatch.setattr(selection, "PIECE_BYTES", 7 * 4)
    scores = torch.randn(100, generator=torch.Generator().manual_seed(0))
    for num_keep in (31, 77):
        mask = global_masks({"w": scores}, num_keep)["w"]
        assert int(mask.sum()) == num_keep
        assert scores[mask].min() > scores[~mask].max()
    assert global_masks({"w": torch.ones(100)}, 40)["w"].tolist() == [True] * 40 + [False] * 60


class OneAtATime(Mapping[str, Tensor]):
    """Makes a new tensor at each look-up, as a file would, and fails if the last one is still held."""

    def __init__(self, values: dict[str, list[float]]) -> None:
        self.values_of = values
        self.last: weakref.ref[Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        assert self.last is None or self.last() is None, f"two tensors in memory at the look-up of {name}"
        tensor = torch.tensor(self.values_of[name])
        self.last = weakref.ref(tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_of)

    def __len__(self) -> int:
        return len(self.values_of)


def test_one_shard_is_in_memory_at_a_time():
    masks = global_masks(OneAtATime({"a": [0.0, -0.0], "b": [1.0, 0.0], "c": [-1.0]}), 3)
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "a": [True, True],
        "b": [True, False],
        "c": [False],
    }


def test_masks_have_the_shape_of_the_scores_and_count_in_row_order():
    scores = torch.zeros(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    mask = global_masks({"w": scores}, 5)["w"]
    assert mask.shape == scores.shape
    assert mask.reshape(-1).nonzero().reshape(-1).tolist() == [0, 1, 2, 3, 4]


def test_arrays_that_are_strided_read_only_or_files_are_read_as_they_are(tmp_path):
    np.save(tmp_path / "scores.npy", np.array([[5, 1], [4, 2]], dtype=np.float16))
    file = np.load(tmp_path / "scores.npy", mmap_mode="r")
    assert kth_score(lambda: [file, file[:, 0], file.T], 4).threshold == 4
    assert kth_score(lambda: [torch.arange(8.0)[::2], torch.tensor(9.0, requires_grad=True)], 2).threshold == 6


def test_all_and_nothing():
    shards = {"a": torch.zeros(3), "b": torch.ones(2, 2), "c": -torch.ones(2)}
    assert all(not mask.any() for mask in global_masks(shards, 0).values())
    assert all(mask.all() for mask in global_masks(shards, 9).values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf"), -float("nan")])
def test_scores_that_do_not_order_are_refused_with_their_place(value, dtype):
    shards = {"good": torch.ones(2, dtype=dtype), "bad": torch.tensor([[-1.0, 1.0], [value, 1.0]], dtype=dtype)}
    with pytest.raises(ValueError, match=rf"^shard 1 holds a score of {value} at index 2; .* finite"):
        kth_score(shards.values, 1)
    with pytest.raises(ValueError, match=rf"^bad holds a score of {value} at index 2"):
        global_masks(shards, 1)


def test_the_index_of_a_refused_score_counts_over_pieces(monkeypatch):
    monkeypatch.setattr(selection, "PIECE_BYTES", 8)
    with pytest.raises(ValueError, match="shard 0 holds a score of inf at index 5"):
        kth_score(lambda: [torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, torch.inf])], 1)


def test_a_nan_is_refused_whatever_its_payload():
    payload = np.array([0x7F800001], dtype=np.uint32).view(np.float32)
    with pytest.raises(ValueError, match="score of nan"):
        kth_score(lambda: [payload], 1)


@pytest.mark.parametrize("k", [0, 4])
def test_k_lies_between_one_and_the_number_of_scores(k):
    with pytest.raises(ValueError, match=rf"k \({k}\) must lie between 1 and the number of scores \(3\)"):
        kth_score(lambda: [np.ones(3)], k)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([np.ones(1, dtype=np.float32), np.ones(1)], "shard 1 holds float64, others float32"),
        ([torch.ones(1).half(), torch.ones(1).bfloat16()], "shard 1 holds bfloat16, others float16"),
        ([np.ones(1, dtype=np.int64)], r"floating point \(float16, .*\), got int64"),
    ],
)
def test_mixed_and_integer_scores_are_refused(shards, message):
    with pytest.raises(ValueError, match=message):
        kth_score(lambda: shards, 1)
