"""Sparsity: patterns of weight masks, True = keep, from a score per weight, higher = keep.

# O = outputs (dim 0 of a weight), I = inputs (dim 1), K = the remaining dimensions, a convolution's kernel
# B = blocks, G = groups of m inputs, R = the entries of a row, I * K

A pattern says which weights go together, a scope says which of them compete. Groups and blocks run along the inputs;
in a convolution they are consecutive input channels at the same kernel position, as sparse tensor cores read them.
Every count is exact, and of equal scores the first stays, so that a mask is the same on every machine.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from pipeline.pruning.selection import global_masks

ROWS_NUMEL = 1 << 20
"""Scores whose rows are ranked together: bounds the memory that ranking takes, about 20 bytes a score."""
FINEST = 1 << 60
"""Fractions are searched in steps of one over this: finer than one weight of any network."""


# --- patterns as data -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pattern:
    """What a pattern's name means."""

    unit: int = 1
    """Consecutive inputs that the pattern binds: m of N:M, the size of a block, 1 without structure."""
    num_keep: int | None = None
    """n of N:M: how many stay in each group; None for patterns that leave this to a fraction."""
    all_outputs: bool = False
    """Whether a block holds its inputs for every output."""

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Of "unstructured", "N:M" like "2:4", "block:SIZE" like "block:4", or "input:SIZE" like "input:64"."""
        if text == "unstructured":
            return cls()
        if (match := re.fullmatch(r"block:(\d+)", text)) and int(match[1]) > 1:
            return cls(int(match[1]))
        if (match := re.fullmatch(r"input:(\d+)", text)) and int(match[1]) > 0:
            return cls(int(match[1]), all_outputs=True)
        if (match := re.fullmatch(r"(\d+):(\d+)", text)) and 0 < int(match[1]) < int(match[2]):
            return cls(int(match[2]), int(match[1]))
        raise ValueError(
            f"pattern {text!r} is unknown; known patterns: unstructured, N:M with 0 < N < M like 2:4, "
            "block:SIZE with SIZE > 1 like block:4, input:SIZE like input:64."
        )


def fits(shape: Sequence[int], pattern: str) -> bool:
    """Whether a weight of this shape can have the pattern: the inputs divide into its groups or blocks.

    What does not fit, such as biases, depthwise convolutions and a first layer that reads three colours, stays whole.
    Without structure every shape fits; scope "row" asks for two dimensions all the same.
    """
    parsed = Pattern.parse(pattern)
    return (parsed.unit == 1 and not parsed.all_outputs) or (len(shape) > 1 and shape[1] % parsed.unit == 0)


# --- masks of one weight ----------------------------------------------------------------------------------------------


def n_of_m(score_OIK: Tensor, n: int, m: int) -> Tensor:
    """The mask that keeps the n largest of every m consecutive inputs.

    Args:
        score_OIK: finite [O, I, ...]; m divides I.
        n: 0 up to m.
        m: inputs of a group.

    Returns:
        bool, shaped like the score; of equal scores of a group the first stay.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (2:4).
    """
    if not 0 <= n <= m:
        raise ValueError(f"n ({n}) of {n}:{m} must lie between 0 and {m}, the size of a group.")
    _check_divides(score_OIK, m)
    return _by_rows(score_OIK, partial(_n_of_m, n=n, m=m))


def _n_of_m(score_OIK: Tensor, n: int, m: int) -> Tensor:
    entries = score_OIK.unflatten(1, (-1, m)).unbind(dim=2)  # of the groups: m times [O, G, ...]
    kept = []
    for i, entry in enumerate(entries):
        # A place is the number of entries that go before this one: m - 1 comparisons are faster than sorting.
        place = torch.zeros_like(entry, dtype=torch.int32)
        for j, other in enumerate(entries):
            if j != i:
                place += other >= entry if j < i else other > entry
        kept.append(place < n)
    return torch.stack(kept, dim=2).flatten(1, 2)


def largest_per_row(score_OIK: Tensor, num_keep: int) -> Tensor:
    """The mask that keeps the `num_keep` largest scores of every output.

    Args:
        score_OIK: finite [O, I, ...]; a row is everything that one output reads.
        num_keep: 0 up to the length of a row.

    Returns:
        bool, shaped like the score; of equal scores of a row the first in row order stay.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024 (Wanda), which
    compares within one output.
    """
    row_length = _row_length(score_OIK)
    if not 0 <= num_keep <= row_length:
        raise ValueError(f"num_keep ({num_keep}) must lie between 0 and {row_length}, the length of a row.")
    return _by_rows(score_OIK, partial(_largest, k=num_keep))


def _row_length(score_OIK: Tensor) -> int:
    if score_OIK.dim() < 2:
        raise ValueError(
            f"a weight of shape {list(score_OIK.shape)} has no rows [outputs, inputs, ...]. Leave it whole."
        )
    return math.prod(score_OIK.shape[1:])


def _largest(score_OIK: Tensor, k: int) -> Tensor:
    score_OR = score_OIK.flatten(1)
    if k == 0:
        return torch.zeros_like(score_OIK, dtype=torch.bool)
    line_O1 = score_OR.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above, ties = score_OR > line_O1, score_OR == line_O1
    kept = above | (ties & (ties.cumsum(dim=1, dtype=torch.int32) <= k - above.sum(dim=1, keepdim=True)))
    return kept.reshape(score_OIK.shape)


def block_scores(score_OIK: Tensor, size: int, all_outputs: bool = False) -> Tensor:
    """Scores of blocks: the sum over every `size` consecutive inputs; signed scores may cancel.

    Args:
        score_OIK: [O, I, ...]; `size` divides I.
        size: inputs of a block.
        all_outputs: a block holds its inputs for every output and kernel position: a channel, or a head of attention where the
            weight is the projection that reads the heads.

    Returns:
        [O, I / size, ...], of all outputs [1, I / size, 1 ...]; float32, or float64 for scores of float64. Added in float64
        from first to last and rounded once: the same bits for every layout and on every machine.
    """
    _check_divides(score_OIK, size)
    first, *others = score_OIK.detach().unflatten(1, (-1, size)).unbind(dim=2)
    total_OBK = first.to(torch.float64, copy=True)
    for other in others:
        total_OBK += other
    if all_outputs:
        total_OBK = total_OBK.contiguous().sum([0, *range(2, total_OBK.dim())], keepdim=True)
    return total_OBK.to(torch.promote_types(score_OIK.dtype, torch.float32))


def expand_blocks(mask_OBK: Tensor, size: int) -> Tensor:
    """The mask of weights [O, B * size, ...] from the mask of their blocks [O, B, ...]."""
    return mask_OBK.repeat_interleave(size, dim=1)


def _check_divides(score_OIK: Tensor, size: int) -> None:
    if size < 1 or score_OIK.dim() < 2 or score_OIK.shape[1] % size:
        raise ValueError(
            f"a weight of shape {list(score_OIK.shape)} has no inputs (dim 1) that divide by {size}. Leave it whole: "
            "`fits` tells which weights do."
        )


def _by_rows(score_OIK: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """What the rule makes of the outputs, a few at a time, so that what it needs on the way stays small."""
    score_OIK = score_OIK.detach()
    if score_OIK.numel() and not all(math.isfinite(extreme) for extreme in score_OIK.aminmax()):
        index = (~score_OIK.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"the score at {index} is {score_OIK[tuple(index)].item()}; scores must be finite. The network or its loss "
            "gave no number there: look at the statistics of this layer."
        )
    num_rows = max(1, ROWS_NUMEL // max(1, math.prod(score_OIK.shape[1:])))
    return torch.cat([rule(rows) for rows in score_OIK.split(num_rows)])


# --- masks of a network -----------------------------------------------------------------------------------------------


def weight_masks(
    scores: Mapping[str, Tensor],
    *,
    pattern: str,
    keep: float | None = None,
    num_keep: int | None = None,
    scope: str,
) -> dict[str, Tensor]:
    """The masks of all weights that have a score.

    Args:
        scores: name -> finite score per weight, higher = keep. Looked up one at a time, several times in scope
            "global", so that a mapping may read from disk. Weights that stay whole are left out; `fits` tells which
            must be.
        pattern: as `Pattern.parse` reads it.
        keep: fraction of the weights, or blocks, that stays: above 0, up to 1; times their number and rounded down,
            exactly. N:M has its own, n / m; say that or None.
        num_keep: in place of `keep`, the most weights that may stay. In scope "global" without structure it is exactly that many; else
            as many as whole blocks, or one fraction of all layers or rows, allow.
        scope: a name in SCOPES: who competes. In N:M it is always the entries of a group, whatever the scope.

    Returns:
        name -> bool, True = keep, shaped like the score.

    Raises:
        ValueError: pattern, keep and scope do not go together, a weight does not fit the pattern, a score is infinite
            or NaN, or nothing would be kept of what competes.
    """
    parsed = Pattern.parse(pattern)
    if (masks_of := SCOPES.get(scope)) is None:
        raise ValueError(f"scope {scope!r} is unknown; known scopes: {', '.join(SCOPES)}.")
    assert num_keep is None or parsed.num_keep is None, "N:M says by itself how many weights stay"
    fraction = kept_fraction(pattern, keep) if num_keep is None else Fraction(1)
    if not scores:
        raise ValueError(f"there are no scores: no weight fits pattern {pattern}, or all were left out.")
    if parsed.num_keep is not None:
        rule = partial(n_of_m, n=parsed.num_keep, m=parsed.unit)
        return {name: _named(name, rule, scores[name]) for name in scores}
    blocks = _Blocks(scores, parsed)
    entries = scores if parsed == Pattern() else blocks
    if num_keep is not None and scope == "global" and parsed.all_outputs:
        entries = dict(entries)  # a block holds its inputs for all outputs: they are few, and of unlike sizes
        fraction = _global_fraction(entries, blocks.shapes, num_keep)
    elif num_keep is not None:
        shapes = {name: scores[name].shape for name in scores}
        fraction = fraction_within(shapes, pattern=pattern, scope=scope, num_keep=num_keep)
    masks = masks_of(entries, fraction)
    if parsed == Pattern():
        return masks
    return {name: expand_blocks(masks.pop(name), parsed.unit).expand(blocks.shapes[name]).clone() for name in scores}


def fraction_within(shapes: Mapping[str, Sequence[int]], *, pattern: str, scope: str, num_keep: int) -> Fraction:
    """The largest fraction of what competes with which at most `num_keep` weights stay, whatever their scores are.

    Args:
        shapes: name -> shape of each weight.
        pattern: not N:M; not input:SIZE in scope "global", whose blocks are of unlike sizes, so that scores decide how many weights stay.
    """
    sets = []  # how many sets of this kind, entries that compete in one, weights of an entry
    for shape in shapes.values():
        entries, competing = (
            math.prod(_block_shape(shape, Pattern.parse(pattern))),
            num_competing(shape, pattern, scope),
        )
        sets.append((entries // competing, competing, math.prod(shape) // entries))
    if scope == "global":
        sets = [(1, sum(entries for _, entries, _ in sets), sets[0][2])]

    def num_weights(step: int) -> int:
        return sum(num_sets * (step * entries // FINEST) * weights for num_sets, entries, weights in sets)

    return Fraction(bisect_right(range(FINEST + 1), num_keep, key=num_weights) - 1, FINEST)


def _global_fraction(blocks: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], num_keep: int) -> Fraction:
    """The largest fraction of all blocks of which the best hold at most `num_keep` weights."""
    numel = {name: math.prod(shape) // blocks[name].numel() for name, shape in shapes.items()}
    total = sum(score.numel() for score in blocks.values())

    def num_weights(num_blocks: int) -> int:
        return sum(int(mask.sum()) * numel[name] for name, mask in global_masks(blocks, num_blocks).items())

    return Fraction(bisect_right(range(total + 1), num_keep, key=num_weights) - 1, total)


def _block_shape(shape: Sequence[int], pattern: Pattern) -> tuple[int, ...]:
    """Of the scores of blocks that `block_scores` makes of scores of this shape."""
    if pattern == Pattern():
        return tuple(shape)
    num_out, num_in, *kernel = shape
    if pattern.all_outputs:
        num_out, kernel = 1, [1] * len(kernel)
    return (num_out, num_in // pattern.unit, *kernel)


def num_competing(shape: Sequence[int], pattern: str, scope: str) -> int:
    """Weights, or blocks, of one weight that compete: of an output in scope "row", else all of them."""
    return math.prod(_block_shape(shape, Pattern.parse(pattern))[1 if scope == "row" else 0 :])


def kept_fraction(pattern: str, keep: float | None) -> Fraction:
    """The fraction that stays, exactly. ValueError if pattern and keep do not go together."""
    parsed = Pattern.parse(pattern)
    if parsed.num_keep is not None:
        own = parsed.num_keep / parsed.unit
        if keep is not None and keep != own:
            raise ValueError(f"keep ({keep}) contradicts pattern {pattern}, which keeps {own}. Leave keep out.")
        return Fraction(parsed.num_keep, parsed.unit)
    if keep is None or not 0 < keep <= 1:
        raise ValueError(f"keep ({keep}) must be above 0 and at most 1: the fraction that stays in pattern {pattern}.")
    return Fraction(repr(float(keep)))  # 0.3 of 10 is 3, and a little less in floating point


class _Blocks(Mapping[str, Tensor]):
    """The scores of blocks, computed anew at each look-up."""

    def __init__(self, scores: Mapping[str, Tensor], pattern: Pattern) -> None:
        self.scores = scores
        self.rule = partial(block_scores, size=pattern.unit, all_outputs=pattern.all_outputs)
        self.shapes: dict[str, torch.Size] = {}
        """Of the weights that were looked up."""

    def __getitem__(self, name: str) -> Tensor:
        score = self.scores[name]
        self.shapes[name] = score.shape
        return _named(name, self.rule, score)

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)


def _named(name: str, rule: Callable[[Tensor], Tensor], score: Tensor) -> Tensor:
    """What the rule makes of the score; its complaints get the name."""
    try:
        return rule(score)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


# --- scopes -----------------------------------------------------------------------------------------------------------


def _global(scores: Mapping[str, Tensor], keep: Fraction) -> dict[str, Tensor]:
    """All scores compete; ties go by (name, index)."""
    return global_masks(scores, _num_keep(keep, sum(scores[name].numel() for name in scores)))


def _layer(scores: Mapping[str, Tensor], keep: Fraction) -> dict[str, Tensor]:
    """Every weight keeps the same fraction."""

    def mask(score: Tensor) -> Tensor:
        return global_masks({"weight": score}, _num_keep(keep, score.numel()))["weight"]

    return {name: _named(name, mask, scores[name]) for name in scores}


def _row(scores: Mapping[str, Tensor], keep: Fraction) -> dict[str, Tensor]:
    """Every output of every weight keeps the same fraction."""

    def mask(score: Tensor) -> Tensor:
        return largest_per_row(score, _num_keep(keep, _row_length(score)))

    return {name: _named(name, mask, scores[name]) for name in scores}


def _num_keep(keep: Fraction, num_scores: int) -> int:
    num_keep = math.floor(keep * num_scores)
    if num_keep == 0:
        raise ValueError(
            f"keep ({float(keep)}) leaves none of the {num_scores} scores that compete. Raise keep, choose a wider "
            "scope, or leave the weight whole."
        )
    return num_keep


SCOPES: dict[str, Callable[[Mapping[str, Tensor], Fraction], dict[str, Tensor]]] = {
    "global": _global,
    "layer": _layer,
    "row": _row,
}
