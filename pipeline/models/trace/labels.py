"""Slots and labels: which parameter entries can only go together.

A slot is one index of one dimension of a parameter or buffer. A label is an int64 tensor of the shape of a value, whose entries say
which slot an element belongs to (0 = none); along axes on which it does not vary it has stride 0, so that views of large feature
maps run on storage of the channels' size. Rules only ever add edges between slots and freeze slots, with a reason; the classes are
the connected components, found once at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor


@dataclass(frozen=True)
class Reason:
    """Why slots stay whole."""

    operation: str
    where: str
    text: str


class Slots:
    """Slots by (tensor, dim), the edges between them, and what is frozen."""

    def __init__(self) -> None:
        self._base: dict[tuple[str, int], int] = {}
        self._sizes: dict[tuple[str, int], int] = {}
        self.roles: dict[tuple[str, int], str] = {}
        self._next = 1  # slot 0 is "no channel"
        self._edges: list[tuple[np.ndarray, np.ndarray]] = []
        self._frozen: list[tuple[np.ndarray, Reason]] = []

    def of(self, tensor: str, dim: int, size: int, role: str) -> Tensor:
        """Slots of a dimension, int64 [size]; made on first use."""
        key = (tensor, dim)
        if key not in self._base:
            self._base[key], self._sizes[key], self.roles[key] = self._next, size, role
            self._next += size
        assert self._sizes[key] == size
        return torch.arange(self._base[key], self._base[key] + size)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """a[i] and b[i] go together. Where one is 0 there is nothing to say."""
        left, right = a.reshape(-1).numpy(), b.reshape(-1).numpy()
        both = (left > 0) & (right > 0) & (left != right)
        if both.any():
            pairs = np.unique(np.stack([left[both], right[both]]), axis=1)
            self._edges.append((pairs[0], pairs[1]))

    def freeze(self, slots: Tensor, reason: Reason) -> None:
        ids = np.unique(slots.reshape(-1).numpy())
        ids = ids[ids > 0]
        if ids.size:
            self._frozen.append((ids, reason))

    def classes(self) -> tuple[np.ndarray, dict[int, Reason]]:
        """Class of every slot, int [slots + 1], and the first reason of every frozen class."""
        edges = np.concatenate([np.stack(pair) for pair in self._edges], axis=1) if self._edges else np.zeros((2, 0), int)
        graph = coo_matrix((np.ones(edges.shape[1], dtype=np.int8), (edges[0], edges[1])), shape=(self._next, self._next))
        _, class_of = connected_components(graph, directed=False)
        frozen: dict[int, Reason] = {}
        for ids, reason in self._frozen:
            for one in np.unique(class_of[ids]).tolist():
                frozen.setdefault(one, reason)
        return class_of, frozen

    def dimensions(self) -> Iterable[tuple[str, int, int, int]]:
        """(tensor, dim, first slot, size), in the order of first use."""
        return [(tensor, dim, self._base[tensor, dim], self._sizes[tensor, dim]) for tensor, dim in self._base]


# --- labels ------------------------------------------------------------------------------------------------------------


def compress(label: Tensor) -> Tensor:
    """The same label with stride 0 along each axis on which it does not vary."""
    for axis, (size, stride) in enumerate(zip(label.shape, label.stride(), strict=True)):
        if size > 1 and stride != 0:
            first = label.narrow(axis, 0, 1)
            if bool((label == first).all()):
                label = first.expand(label.shape)
    return label


def varying(label: Tensor) -> list[int]:
    """Axes along which a compressed label varies."""
    return [axis for axis, (size, stride) in enumerate(zip(label.shape, label.stride(), strict=True)) if size > 1 and stride != 0]


def along(slots: Tensor, shape: Iterable[int], axis: int) -> Tensor:
    """A label of `shape` that is `slots` along `axis`."""
    shape = list(shape)
    view = [1] * len(shape)
    view[axis] = len(slots)
    return slots.view(view).expand(shape)


def vector(label: Tensor, axis: int) -> Tensor | None:
    """The slots along `axis`, or None where the label varies along another axis."""
    if any(other != axis % label.dim() for other in varying(label)):
        return None
    for other in range(label.dim() - 1, -1, -1):
        if other != axis % label.dim():
            label = label.select(other, 0)
    return label
