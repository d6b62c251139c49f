"""Selection: the exact k-th largest of scores that lie in shards, without gathering or sorting them.

The bits of floats order like sign and magnitude. So the k-th largest is found 16 bits at a time: a histogram of the
leading bits over all shards tells in which bucket it lies, the next pass looks into that bucket only. One pass for half
precision, two for float32, four for float64; histograms add, so that shards may lie on many machines; memory is one
shard, one histogram and one piece.

What is particular about floats is read off the histogram, not asked of each score: negative numbers are buckets in
reverse, infinities and NaN are buckets that must be empty.

Ties are broken by (shard name, index), the first stay: the count is exact and the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RADIX_BITS = 16
DIGIT = (1 << RADIX_BITS) - 1
PIECE_BYTES = 1 << 20
"""Looked at together: small enough for a core's cache and for malloc to use the same memory again, large enough that
neither Python nor the 65536 counters of each piece matter."""

Array = Tensor | NDArray[Any]
Bits = NDArray[Any]
"""uint16, uint32 or uint64"""
Counts = NDArray[np.int64]
"""[65536]: how many scores have each digit."""


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


def kth_score(shards: Callable[[], Iterable[Array]], k: int, *, names: Sequence[str] = ()) -> Selection:
    """The k-th largest score over all shards.

    Args:
        shards: called once per pass; gives the same scores each time, as tensors or arrays of any shape, one float type
            for all. Scores are finite; -0.0 counts as 0.
        k: 1 for the largest, up to the number of scores.
        names: of the shards, in their order, for messages; without, their numbers are told.

    Raises:
        ValueError: k is out of range, a score is infinite or NaN, or the shards are not of one float type.
    """
    kind, leading = _leading_digits(shards, names)
    num_scores = int(leading.sum())
    if not 1 <= k <= num_scores:
        raise ValueError(f"k ({k}) must lie between 1 and the number of scores ({num_scores}).")
    prefix, num_above = _bucket(leading, NUMBERS, k)
    order = MAGNITUDES[::-1] if prefix & SIGN else MAGNITUDES
    counts = leading
    for shift in range(kind.num_bits - 2 * RADIX_BITS, -1, -RADIX_BITS):
        counts = _sum(map(partial(_digits, shift=shift, prefix=prefix), shards()))
        digit, above = _bucket(counts, order, k - num_above)
        prefix, num_above = prefix << RADIX_BITS | digit, num_above + above
    num_ties = int(counts[prefix & DIGIT])
    threshold = kind.value(prefix)
    if threshold == 0 and leading[0] and leading[SIGN]:
        # 0.0 and -0.0 are equal, and their bits are not: those of the other sign were left out, or taken for larger.
        twins = sum(map(partial(_count, pattern=prefix ^ 1 << (kind.num_bits - 1)), shards()))
        num_ties += twins
        num_above -= twins if prefix else 0
    return Selection(threshold, num_above, num_ties, k - num_above)


def global_masks(shards: Mapping[str, Tensor], num_keep: int) -> dict[str, Tensor]:
    """Masks that keep exactly the `num_keep` largest scores of all shards together.

    Args:
        shards: name -> scores, as for `kth_score`. Looked up anew in each pass and one at a time, so that a mapping may
            read from disk.
        num_keep: 0 up to the number of scores.

    Returns:
        name -> bool, True = keep, shaped like the scores. Of equal scores the first by (name, index) are kept.
    """
    selection = Selection(math.inf, 0, 0, 0)
    if num_keep:
        selection = kth_score(lambda: (shards[name] for name in shards), num_keep, names=list(shards))
    ties_left = selection.num_ties_kept
    masks = {}
    for name in sorted(shards):
        masks[name], num_ties = _mask(shards[name], selection.threshold, ties_left)
        ties_left -= num_ties
    assert ties_left == 0, f"{ties_left} ties were counted and not found: the shards changed between passes"
    return {name: masks[name] for name in shards}


def _mask(scores: Tensor, threshold: float, ties_left: int) -> tuple[Tensor, int]:
    """The mask of one shard, and how many ties it keeps: the first ones, up to `ties_left`."""
    flat = scores.detach().reshape(-1)
    mask = torch.empty_like(flat, dtype=torch.bool)
    num_ties = 0
    for piece, kept in zip(flat.split(PIECE_BYTES), mask.split(PIECE_BYTES), strict=True):
        torch.gt(piece, threshold, out=kept)
        if num_ties < ties_left:
            ties = (piece == threshold).nonzero().reshape(-1)[: ties_left - num_ties]
            kept[ties] = True
            num_ties += len(ties)
    return mask.reshape(scores.shape), num_ties


# --- bits -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _FloatType:
    """How the bits of a float type are read: sign, then exponent, then fraction."""

    name: str
    num_bits: int
    exponent: int
    """The leading digit's bits that belong to the exponent; all of them set means infinite or NaN."""

    def value(self, pattern: int) -> float:
        bits = np.array([pattern], dtype=f"uint{self.num_bits}")
        return float(torch.from_numpy(bits).view(getattr(torch, self.name))) + 0.0  # makes 0.0 of -0.0


FLOAT_TYPES = {
    "float16": _FloatType("float16", 16, 0x7C00),
    "bfloat16": _FloatType("bfloat16", 16, 0x7F80),
    "float32": _FloatType("float32", 32, 0x7F80),
    "float64": _FloatType("float64", 64, 0x7FF0),
}

SIGN = 1 << (RADIX_BITS - 1)
MAGNITUDES = np.arange(1 << RADIX_BITS)
"""Digits of non-negative numbers, rising with the number."""
NUMBERS = np.concatenate([MAGNITUDES[SIGN:][::-1], MAGNITUDES[:SIGN]])
"""Leading digits, rising with the number: the larger its magnitude, the smaller is a negative one."""


def _leading_digits(shards: Callable[[], Iterable[Array]], names: Sequence[str]) -> tuple[_FloatType, Counts]:
    """The float type, and the counts of the leading digit; every score is checked here."""
    kind: _FloatType | None = None
    counts = np.zeros(1 << RADIX_BITS, dtype=np.int64)

    def leading(shard: Array) -> tuple[_FloatType, Counts]:
        found = _float_type(shard)
        return found, _digits(shard, shift=found.num_bits - RADIX_BITS)

    for number, (found, of_shard) in enumerate(map(leading, shards())):
        kind = kind or found
        if found != kind:
            raise ValueError(f"{_label(names, number)} holds {found.name}, others {kind.name}. Convert one of them.")
        counts += of_shard
    kind = kind or FLOAT_TYPES["float32"]
    if counts[MAGNITUDES & kind.exponent == kind.exponent].any():
        _refuse(shards, names)
    return kind, counts


def _digits(shard: Array, shift: int, prefix: int | None = None) -> Counts:
    """Counts of the 16 bits at `shift`, over the scores whose higher bits are `prefix`; None: over all scores."""
    counts = np.zeros(1 << RADIX_BITS, dtype=np.int64)
    for piece in _pieces(shard):
        inside = piece if prefix is None else piece[piece >> (shift + RADIX_BITS) == prefix]
        digits = (inside >> shift & DIGIT).astype(np.int32)
        # torch counts int32 as they are; numpy would make int64 of them first, and takes twice as long.
        counts += torch.bincount(torch.from_numpy(digits), minlength=len(counts)).numpy()
    return counts


def _count(shard: Array, pattern: int) -> int:
    return sum(int(np.count_nonzero(piece == pattern)) for piece in _pieces(shard))


def _sum(counts: Iterable[Counts]) -> Counts:
    """Over all shards. Fed by `map`, which lets go of a shard before it asks for the next: one in memory, not two."""
    return sum(counts, start=np.zeros(1 << RADIX_BITS, dtype=np.int64))


def _pieces(shard: Array) -> Iterator[Bits]:
    """The bits of the scores as unsigned integers, one dimension, piece by piece."""
    unsigned = f"uint{_float_type(shard).num_bits}"
    if isinstance(shard, Tensor):
        bits = shard.detach().cpu().reshape(-1).view(getattr(torch, unsigned)).numpy()
    else:
        bits = np.asarray(shard).reshape(-1).view(unsigned)
    step = PIECE_BYTES // max(bits.itemsize, 4)  # digits are counted as int32, those of half precision too
    for start in range(0, bits.size, step):
        yield bits[start : start + step]


def _float_type(shard: Array) -> _FloatType:
    name = str(shard.dtype).removeprefix("torch.")
    if name not in FLOAT_TYPES:
        raise ValueError(f"scores must be floating point ({', '.join(FLOAT_TYPES)}), got {name}. Convert them.")
    return FLOAT_TYPES[name]


def _bucket(counts: Counts, order: NDArray[np.int64], k: int) -> tuple[int, int]:
    """The digit of the k-th largest, and how many have larger ones; `order` lists the digits, rising."""
    from_top = np.cumsum(counts[order[::-1]])
    position = int(np.searchsorted(from_top, k))
    digit = int(order[::-1][position])
    return digit, int(from_top[position] - counts[digit])


def _label(names: Sequence[str], number: int) -> str:
    return names[number] if names else f"shard {number}"


def _refuse(shards: Callable[[], Iterable[Array]], names: Sequence[str]) -> NoReturn:
    """Search for the score that the counts have betrayed, and name it."""
    for number, shard in enumerate(shards()):
        kind, start = _float_type(shard), 0
        exponent = kind.exponent << (kind.num_bits - RADIX_BITS)
        for piece in _pieces(shard):
            if len(bad := np.flatnonzero(piece & exponent == exponent)):
                score, index = kind.value(int(piece[bad[0]])), start + int(bad[0])
                raise ValueError(
                    f"{_label(names, number)} holds a score of {score} at index {index}; scores must be finite. "
                    "The network or its loss gave no number there: look at the statistics of this layer."
                )
            start += len(piece)
    raise AssertionError("a score was not finite in one pass and is in the next: the shards changed between passes")
