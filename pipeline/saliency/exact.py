"""Order-free sums: float addition is not associative, integer addition is.

Each statistic is summed as int64 fixed point on a grid of its own, a power of two fixed once by a pilot. Every addend is
rounded to that grid; what comes out does not depend on the order, the grouping, the number of workers or on retries.

A grid leaves room for `num_addends` addends, each up to 2^headroom_bits times the pilot's largest magnitude. With the default
of 12 bits and a million addends a value of the pilot's size keeps 30 bits, more than the float32 gradients it comes from.

What lies above (a mislabelled row in a network that is sure of all others) goes to a second grid, 2^30 times coarser, element by
element. Which of the two takes an element depends on its value alone, so the sum of both is as free of order as each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SUM_BITS = 62  # int64 without its sign, and one spare bit for the check itself
FLOAT_BITS = 52  # a float64 addend is exact on the grid only up to its own mantissa
COARSE_BITS = 30
COARSE = "#coarse"
"""Suffix of a statistic's second total, which exists only where it was needed."""


class SumOverflow(ArithmeticError):
    """An addend is no finite number, or lies beyond any range that the pilot makes likely."""


@dataclass(frozen=True)
class Grid:
    """Fixed-point grids, one per statistic: value = integer * 2^-exponent, |addend| <= limit."""

    exponents: dict[str, int]
    addend_bits: int
    """Largest magnitude of one addend, as a power of two on the integer side."""

    @classmethod
    def from_pilot(cls, pilot: Mapping[str, Tensor], num_addends: int, headroom_bits: int = 12) -> Grid:
        """Fix the grids from the sums of one unit.

        Args:
            pilot: float64 or int64 sums of one unit, by statistic. An all-zero statistic gets the coarsest grid of the others
                of its kind (the part of its name before "/"), since a dead layer in one unit may live in the next.
            num_addends: how many addends there will be at most.
            headroom_bits: how much larger than the pilot's an addend may be, as a power of two.
        """
        addend_bits = min(SUM_BITS - max(1, math.ceil(math.log2(max(2, num_addends)))), FLOAT_BITS)
        if addend_bits - headroom_bits < 16:
            raise ValueError(
                f"{num_addends} addends with {headroom_bits} bits of headroom leave {addend_bits - headroom_bits} bits for a value. "
                "Use larger units: raise score.rows_per_unit."
            )
        tops = {name: _top_exponent(value) for name, value in pilot.items() if value.is_floating_point()}
        exponents = {}
        for name, top in tops.items():
            if top is None:
                kind = name.split("/")[0]
                top = max((t for other, t in tops.items() if t is not None and other.split("/")[0] == kind), default=0)
            exponents[name] = addend_bits - headroom_bits - top
        return cls(exponents, addend_bits)

    def quantise(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Round an addend to its grids: int64 of the same shape by name of the total. Integers (counts) are their own grid."""
        if not value.is_floating_point():
            return {name: value.to(torch.int64)}
        scaled = _scale(value, self.exponents[name])
        above = ~(scaled.abs() <= 2.0**self.addend_bits)  # a NaN is above, too
        if not above.any():
            return {name: scaled.round_().to(torch.int64)}
        coarse = torch.where(above, _scale(value, self.exponents[name] - COARSE_BITS), 0.0)
        if not coarse.abs().max().item() <= 2.0**self.addend_bits:
            raise SumOverflow(
                f"statistic '{name}' has an addend of {value.abs().max().item():g}, its grid ends at {self.limit(name):g}. "
                "The network gives NaN, Inf or a loss that explodes on these rows: check its weights and input."
            )
        fine = torch.where(above, 0.0, scaled)
        return {name: fine.round_().to(torch.int64), name + COARSE: coarse.round_().to(torch.int64)}

    def value(self, name: str, total: Tensor) -> Tensor:
        """What a total stands for, as float64 (counts stay int64)."""
        base = name.removesuffix(COARSE)
        if base not in self.exponents:
            return total
        return _scale(total, (COARSE_BITS if base != name else 0) - self.exponents[base])

    def limit(self, name: str) -> float:
        """Largest magnitude of an addend."""
        return 2.0 ** (self.addend_bits + COARSE_BITS - self.exponents[name])


def _scale(value: Tensor, exponent: int) -> Tensor:
    """value * 2^exponent in float64."""
    return torch.ldexp(value.double(), torch.tensor(float(exponent), dtype=torch.float64))


def _top_exponent(value: Tensor) -> int | None:
    """Smallest e with max|value| <= 2^e, None for zeros."""
    if value.numel() == 0:
        return None
    top = value.double().abs().max().item()
    if not math.isfinite(top):
        raise SumOverflow(
            "the pilot unit gives NaN or Inf: the network itself is broken on these rows. Check its weights and input."
        )
    return None if top == 0.0 else math.frexp(top)[1]


class ExactSums:
    """Named int64 sums on a grid. Adding is exact: `a + b` in any order and grouping gives the same bits."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.totals: dict[str, Tensor] = {}

    def add(self, addend: Mapping[str, Tensor]) -> None:
        """Add the float64 or int64 sums of one unit. Counts once towards the grid's number of addends."""
        for name, value in addend.items():
            self.merge(self.grid.quantise(name, value.detach().cpu()))

    def merge(self, totals: Mapping[str, Tensor]) -> None:
        """Add the int64 totals of another accumulator on the same grid."""
        for name, value in totals.items():
            self.add_quantised(name, value)

    def add_quantised(self, name: str, value: Tensor) -> None:
        old = self.totals.get(name)
        if old is None:
            self.totals[name] = value.clone()
            return
        total = old + value
        # Two's complement wraps exactly when both addends have one sign and the sum the other.
        if bool((((old ^ total) & (value ^ total)) < 0).any()):
            raise SumOverflow(
                f"the sum of statistic '{name}' left the range of int64: more addends than the grid was made for."
            )
        self.totals[name] = total

    def values(self) -> dict[str, Tensor]:
        """The sums: float64, int64 for counts."""
        values: dict[str, Tensor] = {}
        for name, total in sorted(self.totals.items()):  # a statistic stands before its coarse part
            base, value = name.removesuffix(COARSE), self.grid.value(name, total)
            values[base] = values[base] + value if base in values else value
        return values
