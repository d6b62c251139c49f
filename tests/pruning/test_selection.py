"""Selection: the k-th largest equals a full sort, bit for bit, whatever the shards, ties, zeros and subnormals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline.pruning import selection
from pipeline.pruning.selection import Selection, global_masks, kth_score

SPECIAL = [0.0, -0.0, 1e-45, 1.1754944e-38, 1.0, 1.0000001, 3.4e38, 0.1]
"""Zero of both signs, the smallest subnormal, the smallest normal, neighbours, nearly the largest."""


@st.composite
def shard_sets(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], int]:
    """Named shards of one float type, and how many scores to keep."""
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    width = np.dtype(dtype).itemsize * 8
    anything = st.floats(0, float(np.finfo(dtype).max), width=width, allow_subnormal=True)
    values = st.one_of(st.sampled_from([float(dtype(v)) for v in SPECIAL]), anything)
    names = draw(st.lists(st.sampled_from(["a", "b", "b.weight", "c10", "c9"]), unique=True, min_size=1))
    shards = {name: draw(arrays.arrays(dtype, st.integers(0, 12), elements=values)) for name in names}
    total = sum(shard.size for shard in shards.values())
    return shards, draw(st.integers(0, total))


@given(shard_sets())
def test_masks_equal_a_full_sort_by_score_name_and_index(case):
    shards, num_keep = case
    ranked = sorted((-float(v), name, i) for name, shard in shards.items() for i, v in enumerate(shard))
    masks = global_masks({name: torch.from_numpy(shard) for name, shard in shards.items()}, num_keep)
    assert list(masks) == list(shards)
    chosen = {(name, i) for name, mask in masks.items() for i in mask.nonzero().reshape(-1).tolist()}
    assert chosen == {(name, i) for _, name, i in ranked[:num_keep]}


@given(shard_sets())
def test_threshold_and_ties_equal_a_full_sort(case):
    shards, k = case
    scores = np.sort(np.concatenate(list(shards.values())))[::-1]
    if k == 0:
        return
    found = kth_score(lambda: shards.values(), k)
    above, ties = int((scores > scores[k - 1]).sum()), int((scores == scores[k - 1]).sum())
    assert found == Selection(float(scores[k - 1]), above, ties, k - above)


def test_ties_by_hand():
    shards = {"b": torch.tensor([2.0, 1.0, 2.0]), "a": torch.tensor([2.0, 5.0])}
    masks = global_masks(shards, 3)
    # 5 is kept; of the three 2s, "a" comes before "b" and index 0 before 2.
    assert masks["a"].tolist() == [True, True]
    assert masks["b"].tolist() == [True, False, False]
    assert kth_score(lambda: shards.values(), 3) == Selection(2.0, num_above=1, num_ties=3, num_ties_kept=2)


def test_shards_longer_than_a_piece(monkeypatch):
    monkeypatch.setattr(selection, "PIECE", 7)
    scores = torch.rand(100, generator=torch.Generator().manual_seed(0))
    mask = global_masks({"w": scores}, 31)["w"]
    assert int(mask.sum()) == 31
    assert scores[mask].min() > scores[~mask].max()


def test_masks_have_the_shape_of_the_scores_and_count_in_row_order():
    scores = torch.zeros(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    mask = global_masks({"w": scores}, 5)["w"]
    assert mask.shape == scores.shape
    assert mask.reshape(-1).nonzero().reshape(-1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_exact(dtype):
    masks = global_masks({"w": torch.tensor([0.5, 2.0, 1.0, 2.0], dtype=dtype)}, 2)
    assert masks["w"].tolist() == [False, True, False, True]


def test_all_and_nothing():
    shards = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
    assert all(not mask.any() for mask in global_masks(shards, 0).values())
    assert all(mask.all() for mask in global_masks(shards, 7).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0, -float("inf"), -1e-45])
def test_scores_that_do_not_order_are_refused_with_their_shard(value, dtype):
    bad = torch.tensor([1.0, value], dtype=dtype)
    if value == -1e-45:
        bad[1] = -torch.finfo(dtype).smallest_normal / 2
    with pytest.raises(ValueError, match=r"shard 1 holds a score of (inf|nan|-)"):
        kth_score(lambda: [torch.ones(2, dtype=dtype), bad], 1)


@pytest.mark.parametrize("k", [0, 4])
def test_k_lies_between_one_and_the_number_of_scores(k):
    with pytest.raises(ValueError, match=rf"k \({k}\) must lie between 1 and the number of scores \(3\)"):
        kth_score(lambda: [np.ones(3)], k)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([np.ones(1, dtype=np.float32), np.ones(1)], "shard 1 holds float64, others float32"),
        ([np.ones(1, dtype=np.int64)], "floating point, got int64"),
    ],
)
def test_mixed_and_integer_scores_are_refused(shards, message):
    with pytest.raises(ValueError, match=message):
        kth_score(lambda: shards, 1)
