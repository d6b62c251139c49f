"""Parameters and multiply-accumulates (MACs) of a network of which some channels are kept: exact, from the graph alone.

# G = groups, T = tensors, D = dimensions of a tensor (padded with ones)

Every tensor is the product of what is kept of its dimensions, so both measures are sums of products of channel counts.
Which channels go does not matter for the cost, only how many: each channel of a group owns equally many entries. The
tensors of a removed block cost nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.models.graph import Graph

Measure = Literal["params", "macs"]
Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Costs:
    """What a network costs."""

    params: int
    """Elements of all parameters; tied ones once, buffers not at all."""
    macs: int
    """Multiply-accumulates of all weights for one input row of the graph's input shape. Products of two activations
    (attention scores) and elementwise work are not counted."""

    def __getitem__(self, measure: Measure) -> int:
        return {"params": self.params, "macs": self.macs}[measure]


def count(graph: Graph, kept: Mapping[str, Tensor | None], removed_blocks: Collection[str] = ()) -> Costs:
    """Costs of the network that keeps `kept`.

    Args:
        kept: group name -> int64 indices of the channels that stay; None, or a group that is not named, stays whole.
        removed_blocks: names of blocks that are removed.

    Raises:
        ValueError: an unknown group or block, or indices that are no subset of a group's channels.
    """
    for name in kept:
        graph.group(name)
    model = CostModel(graph)
    removed_G = np.zeros(len(graph.groups), dtype=np.int64)
    for g, group in enumerate(graph.groups):
        indices = kept.get(group.name)
        if indices is not None:
            removed_G[g] = group.size - _num_distinct(indices, group.name, group.size)
    gone = {graph.block(name).name for name in removed_blocks}
    return model.costs(removed_G, [b for b, block in enumerate(graph.blocks) if block.name in gone])


def _num_distinct(indices: Tensor, name: str, size: int) -> int:
    values = indices.tolist()
    if len(set(values)) != len(values) or any(not 0 <= value < size for value in values):
        raise ValueError(
            f"kept[{name!r}] must be distinct channel indices from 0 to {size - 1}, "
            f"got {len(values)} that start with {values[:8]}."
        )
    return len(values)


class CostModel:
    """The costs of a graph as a function of how many channels each group has lost; for loops that ask often."""

    def __init__(self, graph: Graph) -> None:
        names = list(graph.shapes)
        row = {name: t for t, name in enumerate(names)}
        counted = set(graph.parameters)
        num_dims = max((len(shape) for shape in graph.shapes.values()), default=0)
        self.sizes_TD: Int64 = np.ones((len(names), num_dims), dtype=np.int64)
        for t, shape in enumerate(graph.shapes.values()):
            self.sizes_TD[t, : len(shape)] = shape
        self.factors_T: dict[Measure, Int64] = {
            "params": np.array([name in counted for name in names], dtype=np.int64),
            "macs": np.zeros(len(names), dtype=np.int64),
        }
        for contraction in graph.contractions:
            self.factors_T["macs"][row[contraction.tensor]] += contraction.positions
        # Group g takes widths[g][i] entries off the dimensions of tensor rows[g][i] with each channel.
        self.rows: list[Int64] = []
        self.widths: list[Int64] = []
        for group in graph.groups:
            width_TD: dict[int, Int64] = {}
            for member in group.members:
                width_D = width_TD.setdefault(row[member.tensor], np.zeros(num_dims, dtype=np.int64))
                width_D[member.dim] += member.index_CK.shape[1]
            self.rows.append(np.array(list(width_TD), dtype=np.int64))
            self.widths.append(np.array(list(width_TD.values()), dtype=np.int64).reshape(len(width_TD), num_dims))
        self.block_rows: list[Int64] = [
            np.array([row[name] for name in block.tensors], dtype=np.int64) for block in graph.blocks
        ]
        """Tensors that go with block b."""

    def sizes(self, removed_G: Int64) -> Int64:
        """[T, D]: the sizes of all tensors after group g has lost removed_G[g] channels."""
        sizes_TD = self.sizes_TD.copy()
        for g, (rows, widths) in enumerate(zip(self.rows, self.widths, strict=True)):
            sizes_TD[rows] -= removed_G[g] * widths
        return sizes_TD

    def costs(self, removed_G: Int64, removed_blocks: Collection[int] = ()) -> Costs:
        numel_T = self.sizes(removed_G).prod(axis=1)
        for b in removed_blocks:
            numel_T[self.block_rows[b]] = 0
        return Costs(int(self.factors_T["params"] @ numel_T), int(self.factors_T["macs"] @ numel_T))
