"""Selection: the exact k-th largest of scores that lie in shards, without gathering or sorting them.

The bits of non-negative floats order like unsigned integers. So the k-th largest is found 16 bits at a time: a
histogram of the leading bits over all shards tells in which bucket it lies, the next pass looks into that bucket only.
Two passes for float32, four for float64; histograms add, so that shards may lie on many machines; memory is one
histogram and one piece of a shard.

Ties are broken by (shard name, index), the first stay: the count is exact and the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RADIX_BITS = 16
PIECE = 1 << 18
"""Scores looked at together: small enough for a core's cache, large enough that Python does not matter."""

Array = Tensor | NDArray[Any]
Bits = NDArray[Any]
"""uint32 or uint64"""


@dataclass(frozen=True, slots=True)
class Selection:
    """Where the line lies between what is kept and what is not."""

    threshold: float
    """The k-th largest score; larger ones are all kept."""
    num_above: int
    """Scores that are larger."""
    num_ties: int
    """Scores that equal the threshold."""
    num_ties_kept: int
    """How many of those are kept, the first by (shard name, index)."""


def kth_score(shards: Callable[[], Iterable[Array]], k: int) -> Selection:
    """The k-th largest score over all shards.

    Args:
        shards: called once per pass; gives the same scores each time, as tensors or arrays of any shape, one float type
            for all. Scores are finite and not negative; -0.0 counts as 0.
        k: 1 for the largest, up to the number of scores.

    Raises:
        ValueError: k is out of range, or a score is negative, infinite or NaN.
    """
    bits, histogram = _first_pass(shards)
    num_scores = int(histogram.sum())
    if not 1 <= k <= num_scores:
        raise ValueError(f"k ({k}) must lie between 1 and the number of scores ({num_scores}).")
    prefix, num_above = _bucket(histogram, k)
    for shift in range(bits - 2 * RADIX_BITS, -1, -RADIX_BITS):
        histogram = np.zeros(1 << RADIX_BITS, dtype=np.int64)
        for piece in _pieces(shards):
            inside = piece[piece >> (shift + RADIX_BITS) == prefix]
            histogram += _histogram(inside >> shift & ((1 << RADIX_BITS) - 1))
        digit, above = _bucket(histogram, k - num_above)
        prefix, num_above = prefix << RADIX_BITS | digit, num_above + above
    num_ties = int(histogram[prefix & ((1 << RADIX_BITS) - 1)])
    pattern = np.array([prefix], dtype=np.uint32 if bits == 32 else np.uint64)
    threshold = float(pattern.view(np.float32 if bits == 32 else np.float64)[0])
    return Selection(threshold, num_above, num_ties, k - num_above)


def global_masks(shards: Mapping[str, Tensor], num_keep: int) -> dict[str, Tensor]:
    """Masks that keep exactly the `num_keep` largest scores of all shards together.

    Args:
        shards: name -> scores, as for `kth_score`. Looked up anew in each pass, so that a mapping may read from disk.
        num_keep: 0 up to the number of scores.

    Returns:
        name -> bool, True = keep, shaped like the scores. Of equal scores the first by (name, index) are kept.
    """
    if num_keep == 0:
        return {name: torch.zeros(scores.shape, dtype=torch.bool) for name, scores in shards.items()}
    selection = kth_score(lambda: (shards[name] for name in shards), num_keep)
    ties_left = selection.num_ties_kept
    masks = {}
    for name in sorted(shards):
        scores = shards[name].detach()
        flat = scores.reshape(-1)
        mask = flat > selection.threshold
        if ties_left:
            ties = (flat == selection.threshold).nonzero().reshape(-1)[:ties_left]
            mask[ties] = True
            ties_left -= len(ties)
        masks[name] = mask.reshape(scores.shape)
    assert ties_left == 0, f"{ties_left} ties were counted and not found: the shards changed between passes"
    return {name: masks[name] for name in shards}


def _first_pass(shards: Callable[[], Iterable[Array]]) -> tuple[int, NDArray[np.int64]]:
    """Bits of the float type, and the histogram of the leading digit; every score is checked here."""
    histogram = np.zeros(1 << RADIX_BITS, dtype=np.int64)
    bits = 0
    for number, shard in enumerate(shards()):
        patterns = _patterns(shard)
        if bits and patterns.itemsize * 8 != bits:
            raise ValueError(
                f"shard {number} holds float{patterns.itemsize * 8}, others float{bits}. Convert one of them."
            )
        bits = patterns.itemsize * 8
        infinite = np.array(np.inf, dtype=f"float{bits}").view(patterns.dtype)
        for piece in _split(patterns):
            if piece.size and piece.max() >= infinite:
                _refuse(number, piece)
            histogram += _histogram(piece >> (bits - RADIX_BITS))
    return bits, histogram


def _pieces(shards: Callable[[], Iterable[Array]]) -> Iterator[Bits]:
    for shard in shards():
        yield from _split(_patterns(shard))


def _split(patterns: Bits) -> Iterator[Bits]:
    sign = patterns.dtype.type(1 << (patterns.itemsize * 8 - 1))
    for start in range(0, patterns.size, PIECE):
        piece = patterns[start : start + PIECE]
        yield np.where(piece == sign, 0, piece) if piece.max() >= sign else piece  # -0.0 equals 0 and its bits do not


def _patterns(shard: Array) -> Bits:
    """The bits of the scores as unsigned integers, one dimension. Half precision becomes float32, which is exact."""
    if isinstance(shard, Tensor):
        tensor = shard.detach().cpu()
        shard = (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()
    elif shard.dtype == np.float16:
        shard = shard.astype(np.float32)
    if shard.dtype not in (np.float32, np.float64):
        raise ValueError(f"scores must be floating point, got {shard.dtype}.")
    return np.ascontiguousarray(shard).reshape(-1).view(np.uint32 if shard.dtype == np.float32 else np.uint64)


def _histogram(digits: Bits) -> NDArray[np.int64]:
    return np.bincount(digits.astype(np.int64), minlength=1 << RADIX_BITS)


def _bucket(histogram: NDArray[np.int64], k: int) -> tuple[int, int]:
    """The bucket of the k-th largest, and how many lie in larger buckets."""
    from_top = np.cumsum(histogram[::-1])
    position = int(np.searchsorted(from_top, k))
    digit = len(histogram) - 1 - position
    return digit, int(from_top[position] - histogram[digit])


def _refuse(number: int, piece: Bits) -> NoReturn:
    values: NDArray[np.floating] = piece.view(np.float32 if piece.itemsize == 4 else np.float64)
    worst = values[~(np.isfinite(values) & (values >= 0))][0]
    raise ValueError(
        f"shard {number} holds a score of {worst}; scores must be finite and not negative, since bits are compared. "
        "Take the absolute value or a square, and look for the layer that gives no number."
    )
