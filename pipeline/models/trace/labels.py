"""Slots, the classes that they fall into, and labels: which channel each element of a value belongs to.

A slot is one index of one dimension of a parameter or buffer. Slots that can only go together are a class of a
union-find. A label says for some axes of a value which slot each position belongs to. After every operation a label
varies along single axes only: what remains of a tensor after a cut must be a tensor again, so a channel axis that a
view splits in two is tied along the outer part and stays free along the inner one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]
"""Slot ids by position along one axis; 0 = a position that stays whatever is cut (padding, constants)."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why channels stay whole."""

    operation: str
    where: str
    text: str


@dataclass(frozen=True, slots=True)
class Label:
    """Channels of one value. A value without any Label does not depend on anything that a cut could change."""

    axes: Mapping[int, Ids] = field(default_factory=dict)
    """axis -> slots [size of that axis]; axes that are not named carry no channels."""
    note: Reason | None = None
    """Why there are no channels along the other axes, where an operation has lost them."""
    source: str | None = None
    """The parameter or buffer that the value is, perhaps moved about, scaled or averaged: nothing else has gone into it."""


class Slots:
    """All slots, their classes, the roles of dimensions and the reasons for which slots stay."""

    def __init__(self) -> None:
        self._parent: Ids = np.arange(1024)
        self._next = 1  # slot 0 is "no channel"
        self._bases: list[int] = []
        self.dimensions: list[tuple[str, int]] = []
        """(tensor, dim) in the order of first use; the order of slot ids."""
        self.roles: dict[tuple[str, int], str] = {}
        """What contractions do with a dimension, in the order in which they ran."""
        self._first: dict[tuple[str, int], Ids] = {}
        self._frozen: list[tuple[Ids, Reason]] = []

    def of(self, tensor: str, dim: int, size: int) -> Ids:
        """Slots of a dimension, made on first use."""
        key = (tensor, dim)
        if key not in self._first:
            self._first[key] = np.arange(self._next, self._next + size)
            self._bases.append(self._next)
            self._next += size
            if self._next > len(self._parent):
                self._parent = np.concatenate([self._parent, np.arange(len(self._parent), 2 * self._next)])
            self.dimensions.append(key)
        return self._first[key]

    @property
    def count(self) -> int:
        """All slots that there are, with slot 0."""
        return self._next

    def sizes(self) -> Iterator[tuple[tuple[str, int], int]]:
        """(tensor, dim) and its number of slots, in the order of their ids."""
        return ((key, len(self._first[key])) for key in self.dimensions)

    def owner(self, ids: Ids) -> tuple[str, int] | None:
        """The dimension that the first real slot of `ids` stands for."""
        real = ids[ids > 0]
        return self.dimensions[bisect_right(self._bases, int(real[0])) - 1] if len(real) else None

    def set_role(self, ids: Ids, role: str) -> None:
        """ "out" wins over "in" where a tied weight is both."""
        key = self.owner(ids)
        if key is not None and (role == "out" or key not in self.roles):
            self.roles[key] = role

    def role(self, ids: Ids) -> str | None:
        """What contractions do with the dimension that the first real slot stands for."""
        key = self.owner(ids)
        return self.roles.get(key) if key is not None else None

    def find(self, ids: Ids) -> Ids:
        """The class of each slot: its smallest member."""
        while True:
            up = self._parent[ids]
            root = self._parent[up]
            if np.array_equal(up, root):
                return up
            self._parent[ids] = root
            ids = root

    def unite(self, a: Ids, b: Ids) -> None:
        """a[i] and b[i] go together; pairs with a 0 say nothing."""
        real = (a > 0) & (b > 0)
        a, b = a[real], b[real]
        while True:
            a, b = self.find(a), self.find(b)
            differ = a != b
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            # The smallest root wins, so that the result does not depend on the order of the pairs.
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))

    def freeze(self, ids: Ids, reason: Reason) -> None:
        real = ids[ids > 0]
        if len(real):
            self._frozen.append((np.unique(real), reason))

    def all_frozen(self, ids: Ids) -> bool:
        """Do all of `ids` belong to classes that stay?"""
        frozen = np.concatenate([slots for slots, _ in self._frozen]) if self._frozen else np.zeros(0, dtype=np.int64)
        real = ids[ids > 0]
        return bool(np.isin(self.find(real), self.find(frozen)).all())

    def reasons(self) -> dict[int, Reason]:
        """Class -> the first reason for which it stays."""
        found: dict[int, Reason] = {}
        for ids, reason in self._frozen:
            for one in np.unique(self.find(ids)).tolist():
                found.setdefault(one, reason)
        return found

    def classes(self) -> Iterator[tuple[tuple[str, int], Ids]]:
        """(tensor, dim) and the class of each of its slots, in the order of first use."""
        for key in self.dimensions:
            yield key, self.find(self._first[key])


def spread(ids: Ids, shape: Sequence[int], axis: int) -> Tensor:
    """int64 tensor of `shape` that is `ids` along `axis`; stride 0 elsewhere, so that it takes no memory."""
    view = [1] * len(shape)
    view[axis] = len(ids)
    return torch.from_numpy(ids).view(view).expand(list(shape))


def core(plane: Tensor) -> Tensor:
    """The plane narrowed to size 1 along each axis on which it does not vary."""
    small = plane
    for axis, (size, stride) in enumerate(zip(plane.shape, plane.stride(), strict=True)):
        first = small.narrow(axis, 0, 1)
        if size > 1 and (stride == 0 or bool((small == first).all())):
            small = first
    return small
