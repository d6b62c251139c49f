"""Order-free sums: float addition is not associative, integer addition is.

Each statistic is summed as int64 fixed point on a grid of its own, a power of two fixed once by a pilot. Every addend is
rounded to that grid; what comes out does not depend on the order, the grouping, the number of workers or on retries.

A grid leaves room for `num_addends` addends, each up to 2^headroom_bits times the pilot's largest magnitude. With the default
of 12 bits and a million addends a value of the pilot's size keeps 30 bits, more than the float32 gradients it comes from.

What lies above (a mislabelled row in a network that is sure of all others) goes to a second grid, 2^30 times coarser, element by
element. Which of the two takes an element depends on its value alone, so the sum of both is as free of order as each.

A statistic that holds the channels of many groups side by side has one exponent per group: its *segments*.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SUM_BITS = 62  # int64 without its sign, and one spare bit for the check itself
FLOAT_BITS = 52  # a float64 addend is exact on the grid only up to its own mantissa
COARSE_BITS = 30
COARSE = "#coarse"
"""Suffix of a statistic's second total, which exists only where it was needed."""
STRIDE = "@"
"""`name@4` is the same statistic over every fourth unit, on the same grid."""
PIECE = 1 << 17
"""Elements that are rounded and added together: what they need stays in a core's cache."""

Segments = Mapping[str, tuple[int, ...]]
"""Statistic -> sizes of the parts of its last dimension, each of which has an exponent of its own."""
Magnitudes = dict[str, list[float]]
"""Statistic -> largest |value| of each segment; of the whole where it has none."""


class SumOverflow(ArithmeticError):
    """An addend is no finite number, or lies beyond any range that the pilot makes likely."""


def magnitudes(sums: Mapping[str, Tensor], segments: Segments | None = None) -> Magnitudes:
    """What a grid needs to know of a pilot: a few numbers, however large the sums. Counts have none."""
    floats = {name: value for name, value in sums.items() if value.is_floating_point()}
    return {
        name: _tops(value.split(segments[name], -1) if segments and name in segments else (value,))
        for name, value in floats.items()
    }


def _tops(values: Sequence[Tensor]) -> list[float]:
    """Largest magnitude of each, NaN if there is one. One wait for the device, not one for each tensor."""
    pairs = [torch.aminmax(value) if value.numel() else (value.new_zeros(()),) * 2 for value in values]
    return torch.stack([torch.maximum(-low, high).double() for low, high in pairs]).tolist() if pairs else []


def base(name: str) -> str:
    """The statistic that a total belongs to: without its stride and its grid."""
    return re.sub(rf"({STRIDE}\d+)?({COARSE})?$", "", name)


def order(name: str) -> tuple[str, str]:
    """Sort key under which the totals that belong together stand together."""
    return base(name), name


@dataclass(frozen=True)
class Grid:
    """Fixed-point grids: value = integer * 2^-exponent."""

    exponents: dict[str, list[int]]
    """Statistic -> exponent of each segment."""
    addend_bits: int
    """Largest magnitude of one addend, as a power of two on the integer side."""
    segments: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def from_pilot(
        cls, pilot: Magnitudes, num_addends: int, headroom_bits: int = 12, segments: Segments | None = None
    ) -> Grid:
        """Fix the grids from the magnitudes of one unit.

        Args:
            pilot: of the sums of one unit. A segment of zeros gets the coarsest grid of the others of its kind (the part of its
                name before "/"), since a dead layer in one unit may live in the next.
            num_addends: how many addends there will be at most.
            headroom_bits: how much larger than the pilot's an addend may be, as a power of two.
        """
        addend_bits = min(SUM_BITS - max(1, math.ceil(math.log2(max(2, num_addends)))), FLOAT_BITS)
        if addend_bits - headroom_bits < 16:
            raise ValueError(
                f"{num_addends} addends with {headroom_bits} bits of headroom leave {addend_bits - headroom_bits} bits for a value. "
                "Use larger units: raise score.rows_per_unit."
            )
        tops = {name: [_top_exponent(value) for value in values] for name, values in pilot.items()}
        highest: dict[str, int] = {}
        for name, found in tops.items():
            kind = name.split("/")[0]
            highest[kind] = max([highest.get(kind, -1024), *(top for top in found if top is not None)])
        exponents = {}
        for name, found in tops.items():
            silent = highest[name.split("/")[0]]
            silent = 0 if silent == -1024 else silent
            exponents[name] = [addend_bits - headroom_bits - (silent if top is None else top) for top in found]
        return cls(exponents, addend_bits, {name: tuple(sizes) for name, sizes in (segments or {}).items()})

    def scale(self, name: str, device: torch.device) -> Tensor | float:
        """2^exponent: a number, or a float64 vector along the last dimension of a statistic with segments."""
        name = base(name)
        powers = [math.ldexp(1.0, exponent) for exponent in self.exponents[name]]
        if name not in self.segments:
            return powers[0]
        sizes = torch.tensor(self.segments[name])
        return torch.tensor(powers, dtype=torch.float64).repeat_interleave(sizes).to(device)

    def quantise(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Round an addend to its grids: int64 of the same shape by name of the total. Integers (counts) are their own grid."""
        if not value.is_floating_point():
            return {name: value.to(torch.int64)}
        scaled = value.double() * self.scale(name, value.device)
        above = ~(scaled.abs() <= self.largest)  # a NaN is above, too
        if not above.any():
            return {name: scaled.round_().to(torch.int64)}
        coarse = torch.where(above, scaled * 2.0**-COARSE_BITS, 0.0)
        if not coarse.abs().max().item() <= self.largest:
            worst = value[above].abs().max().item()
            raise SumOverflow(
                f"statistic '{name}' has an addend of {worst:g}; its grids end at 2^{COARSE_BITS} times what the first unit made likely. "
                "The network gives NaN, Inf or a loss that explodes on these rows: check its weights and input."
            )
        fine = torch.where(above, 0.0, scaled)
        return {name: fine.round_().to(torch.int64), name + COARSE: coarse.round_().to(torch.int64)}

    def value(self, name: str, total: Tensor) -> Tensor:
        """What a total stands for, as float64 (counts stay int64)."""
        if base(name) not in self.exponents:
            return total
        coarse = 2.0**COARSE_BITS if name.endswith(COARSE) else 1.0
        return total.double() / self.scale(name, total.device) * coarse

    @property
    def largest(self) -> float:
        """Of the magnitudes on the integer side that one addend may have."""
        return 2.0**self.addend_bits


def _top_exponent(top: float) -> int | None:
    """Smallest e with top <= 2^e, None for zero."""
    if not math.isfinite(top):
        raise SumOverflow(
            "the pilot unit gives NaN or Inf: the network itself is broken on these rows. Check its weights and input."
        )
    return None if top == 0.0 else math.frexp(top)[1]


class ExactSums:
    """Named int64 sums on a grid. Adding is exact: `a + b` in any order and grouping gives the same bits.

    Totals live where their addends do, a GPU or the CPU.
    """

    def __init__(self, grid: Grid, totals: Mapping[str, Tensor] | None = None) -> None:
        self.grid = grid
        self.totals: dict[str, Tensor] = {**(totals or {})}
        self._addends_left = 1 << (SUM_BITS - grid.addend_bits)

    def add(
        self, addend: Mapping[str, Tensor], strides: Sequence[int] = (), nested: frozenset[str] = frozenset()
    ) -> None:
        """Add the float or int64 sums of one unit; those in `nested` also to the totals `name@stride` of these strides."""
        self._addends_left -= 1
        if self._addends_left < 0:
            raise SumOverflow(
                f"more than {1 << (SUM_BITS - self.grid.addend_bits)} addends: the grid was made for fewer."
            )
        large = [name for name in addend if name in self.grid.exponents and name not in {*nested, *self.grid.segments}]
        tops = dict(zip(large, _tops([addend[name] for name in large]), strict=True))
        for name, value in addend.items():
            if name in nested:
                parts = self.grid.quantise(name, value.detach())
                for suffix in ("", *(f"{STRIDE}{stride}" for stride in strides)):
                    self.merge({name + suffix + part.removeprefix(name): total for part, total in parts.items()})
            elif name in tops and tops[name] * self.grid.scale(name, value.device) <= self.grid.largest:
                self._add_large(name, value.detach())
            else:
                self.merge(self.grid.quantise(name, value.detach()))

    def _add_large(self, name: str, value: Tensor) -> None:
        """An addend within the fine grid: nothing of its size is made on the way. `_addends_left` rules out an overflow."""
        scale = self.grid.scale(name, value.device)
        if name not in self.totals:
            self.totals[name] = torch.zeros_like(value, dtype=torch.int64)
        total = self.totals[name]
        order = sorted(range(total.dim()), key=total.stride, reverse=True)  # as it lies in memory, channels last or not
        total, flat = total.permute(order).view(-1), value.permute(order).reshape(-1)
        step = PIECE if value.device.type == "cpu" else max(1, value.numel())
        for start in range(0, len(flat), step):
            piece = flat[start : start + step].to(torch.float64, copy=True)
            total[start : start + step] += piece.mul_(scale).round_().to(torch.int64)

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

    def sample(self, stride: int) -> ExactSums:
        """The sums over every `stride`-th unit, and those over larger strides: what was added of other units is in none of them."""
        chosen = ExactSums(self.grid)
        for name, total in self.totals.items():
            if (found := re.search(rf"{STRIDE}(\d+)({COARSE})?$", name)) and int(found[1]) >= stride:
                own = int(found[1]) == stride
                chosen.totals[base(name) + (found[2] or "") if own else name] = total
        return chosen

    def values(self) -> dict[str, Tensor]:
        """The sums: float64, int64 for counts."""
        values: dict[str, Tensor] = {}
        for name in sorted(self.totals, key=order):  # a statistic stands before its coarse part
            fine, value = name.removesuffix(COARSE), self.grid.value(name, self.totals[name])
            values[fine] = values[fine] + value if fine in values else value
        return values
