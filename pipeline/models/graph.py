"""Channel groups and residual blocks of a network as plain data: what can only go together, what stays whole and why, what is multiplied.

# C = channels of a group, K = entries that one channel owns along one tensor dimension

Nothing here knows a module or an operation: `models.trace` writes a Graph, everything after it reads one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

ROLES = ("out", "in", "affine")


@dataclass(frozen=True, slots=True)
class Member:
    """One dimension of one parameter or buffer whose entries belong to the group's channels."""

    tensor: str
    """Name as in `model.state_dict()`, "layer1.0.conv1.weight". A tied tensor stands under its first name only."""
    dim: int
    index_CK: Tensor
    """int64 [C, K]: channel c owns the entries index_CK[c] along dim, in ascending order."""
    role: str
    """"out": written by a contraction, "in": read by one, "affine": norm or elementwise parameter, bias or buffer."""

    def __post_init__(self) -> None:
        _check_index(self.index_CK, f"member {self.tensor} dim {self.dim}")
        if self.role not in ROLES:
            raise ValueError(f"member {self.tensor}: role {self.role!r} is none of {', '.join(ROLES)}.")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Member):
            return NotImplemented
        same = (self.tensor, self.dim, self.role) == (other.tensor, other.dim, other.role)
        return same and torch.equal(self.index_CK, other.index_CK)

    def __hash__(self) -> int:
        return hash((self.tensor, self.dim, self.role))


@dataclass(frozen=True, slots=True)
class Site:
    """Input of a contraction (convolution, linear, matmul) that *ends* the channels: where removal takes effect."""

    module: str
    """Qualified module name; its first positional input carries the channels."""
    axis: int
    """Channel axis of that input: 1 for a convolution, -1 for a linear layer."""
    index_CK: Tensor
    """int64 [C, K]: positions of channel c along that axis."""
    call: tuple[int, int, str] | None = None
    """Where the module multiplies with a weight by itself, `x @ self.weight`: the how-many-eth torch function it calls, the
    how-many-eth tensor argument of that which carries the channels, instead of the module's input, and the function's name."""

    def __post_init__(self) -> None:
        _check_index(self.index_CK, f"consumer {self.module}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Site):
            return NotImplemented
        same = (self.module, self.axis, self.call) == (other.module, other.axis, other.call)
        return same and torch.equal(self.index_CK, other.index_CK)

    def __hash__(self) -> int:
        return hash((self.module, self.axis, self.call))


@dataclass(frozen=True, slots=True)
class Group:
    """Channels of several tensors that can only go together."""

    name: str
    """Stable: module name of the first producer in order of execution; a second group of that producer ends in "#2"."""
    size: int
    members: tuple[Member, ...]
    consumers: tuple[Site, ...]

    def __post_init__(self) -> None:
        parts = [(m.tensor, m.index_CK) for m in self.members] + [(s.module, s.index_CK) for s in self.consumers]
        for what, index_CK in parts:
            if len(index_CK) != self.size:
                raise ValueError(f"group {self.name} has {self.size} channels, {what} indexes {len(index_CK)}.")


@dataclass(frozen=True, slots=True)
class Branch:
    """Where a residual branch enters the sum with what the block was given."""

    module: str
    """Qualified name of the module whose code adds."""
    call: tuple[int, int, str]
    """The how-many-eth torch function that it calls is the sum, the how-many-eth tensor argument of that the branch; its name."""


@dataclass(frozen=True, slots=True)
class Block:
    """A module that computes x + branch(x): without its branches it hands on its first input, and can go as a whole."""

    name: str
    """Qualified module name."""
    tensors: tuple[str, ...]
    """All its parameters and buffers, which no other module shares."""
    branches: tuple[Branch, ...]

    @property
    def key(self) -> str:
        """Its name among those of the groups: a module may be a block and write channels of its own."""
        return f"block:{self.name}"

    def to_list(self) -> list[Any]:
        return [self.name, list(self.tensors), [[branch.module, *branch.call] for branch in self.branches]]

    @classmethod
    def from_list(cls, values: list[Any]) -> Block:
        name, tensors, branches = values
        return cls(name, tuple(tensors), tuple(Branch(module, (call, i, name)) for module, call, i, name in branches))


@dataclass(frozen=True, slots=True)
class Frozen:
    """Channels that stay whole, or a residual block that stays."""

    group: str
    size: int
    operation: str
    where: str
    """Module path and source line, "blocks.0.norm1 (vision_transformer.py:160)"."""
    reason: str
    """In plain words."""


@dataclass(frozen=True, slots=True)
class Size:
    """A number that the code of a module states about channels; a cut brings it up to date."""

    module: str
    attribute: str
    """Name of the module's attribute that holds it; empty: it is an expression in the source."""
    element: int | None
    """Position, where the attribute is a list."""
    functions: tuple[str, ...]
    """The module's method that holds the expression, or from which these functions lead to it."""
    line: int
    """Of the expression, counted from the first line of its function."""
    column: int
    text: str
    """The expression as it stands, "C // self.num_heads"."""
    channels: dict[str, tuple[int, ...]]
    """Group -> channel of each position that is counted."""
    fixed: int
    """Positions that belong to no group."""
    negative: bool = False
    """It states minus the number."""

    def value(self, kept: Mapping[str, Collection[int]]) -> int:
        """What it has to state when these channels of each group are kept; groups that are not named stay whole."""
        counted = self.fixed
        for name, channels in self.channels.items():
            stays = kept.get(name)
            counted += len(channels) if stays is None else sum(channel in stays for channel in channels)
        return -counted if self.negative else counted

    def without(self, groups: Collection[str]) -> Size:
        """The same number when these groups always stay whole."""
        stays = sum(len(channels) for name, channels in self.channels.items() if name in groups)
        free = {name: channels for name, channels in self.channels.items() if name not in groups}
        return replace(self, channels=free, fixed=self.fixed + stays)

    def to_list(self) -> list[Any]:
        channels = {name: _runs(list(positions)) for name, positions in self.channels.items()}
        place = [self.module, self.attribute, self.element, list(self.functions), self.line, self.column, self.text]
        return [*place, channels, self.fixed, self.negative]

    @classmethod
    def from_list(cls, values: list[Any]) -> Size:
        module, attribute, element, functions, line, column, text, channels, fixed, negative = values
        channels = {name: tuple(_flat(runs)) for name, runs in channels.items()}
        return cls(module, attribute, element, tuple(functions), line, column, text, channels, fixed, negative)


@dataclass(frozen=True, slots=True)
class Contraction:
    """A weight that is multiplied: MACs of one input row = positions * numel(tensor)."""

    tensor: str
    positions: int


@dataclass(frozen=True)
class Graph:
    """Groups, frozen channels, contractions and shapes of one network for one input shape."""

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    contractions: tuple[Contraction, ...]
    shapes: dict[str, tuple[int, ...]]
    """All parameters and buffers, by state_dict name (a tied tensor under each of its names)."""
    parameters: tuple[str, ...]
    """Names of the parameters that are counted; tied ones once."""
    input_shape: tuple[int, ...]
    sizes: tuple[Size, ...] = ()
    """What the code of the network states about channels and has to be brought up to date."""
    heads: tuple[str, ...] = ()
    """Modules in which channels that a view splits go by whole outer parts: attention."""
    blocks: tuple[Block, ...] = ()
    """Residual blocks that can go as a whole, in running order; empty where nobody asked for them."""

    def group(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        known = ", ".join(group.name for group in self.groups) or "none"
        raise ValueError(f"no group {name!r} in this graph; known groups: {known}.")

    def block(self, name: str) -> Block:
        for block in self.blocks:
            if block.name == name:
                return block
        known = ", ".join(block.name for block in self.blocks) or "none (trace with blocks=True)"
        raise ValueError(f"no optional block {name!r} in this graph; known blocks: {known}.")

    def scored(self) -> dict[str, int]:
        """What has saliency, and how many numbers: groups by name one for each channel, then blocks by key one each."""
        return {**{group.name: group.size for group in self.groups}, **{block.key: 1 for block in self.blocks}}

    def gates(self) -> dict[str, tuple[Site | Branch, ...]]:
        """Where what has saliency takes effect, in the same order."""
        channels = {group.name: group.consumers for group in self.groups}
        return {**channels, **{block.key: block.branches for block in self.blocks}}

    def without(self, names: Mapping[str, Frozen]) -> Graph:
        """New graph in which the groups `names`, and the blocks of these keys, are frozen, each with the given reason."""
        for name in names:
            if all(block.key != name for block in self.blocks):
                self.group(name)
        moved = tuple(names[name] for name in self.scored() if name in names)
        sizes = tuple(size.without(names) for size in self.sizes)
        return replace(
            self,
            groups=tuple(group for group in self.groups if group.name not in names),
            blocks=tuple(block for block in self.blocks if block.key not in names),
            frozen=self.frozen + moved,
            sizes=sizes,
        )

    def to_json(self) -> str:
        """Canonical text: sorted keys, no spaces; the same graph gives the same text in every process."""
        document = {
            "groups": [_encode_group(group) for group in self.groups],
            "frozen": [asdict(frozen) for frozen in self.frozen],
            "contractions": [[c.tensor, c.positions] for c in self.contractions],
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "parameters": list(self.parameters),
            "input_shape": list(self.input_shape),
            "sizes": [size.to_list() for size in self.sizes],
            "heads": list(self.heads),
        }
        if self.blocks:
            document["blocks"] = [block.to_list() for block in self.blocks]
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Graph:
        document = json.loads(text)
        return cls(
            groups=tuple(_decode_group(group) for group in document["groups"]),
            frozen=tuple(Frozen(**frozen) for frozen in document["frozen"]),
            contractions=tuple(Contraction(tensor, positions) for tensor, positions in document["contractions"]),
            shapes={name: tuple(shape) for name, shape in document["shapes"].items()},
            parameters=tuple(document["parameters"]),
            input_shape=tuple(document["input_shape"]),
            sizes=tuple(Size.from_list(values) for values in document["sizes"]),
            heads=tuple(document["heads"]),
            blocks=tuple(Block.from_list(values) for values in document.get("blocks", [])),
        )

    def sha256(self) -> str:
        """Of the canonical JSON text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def encode_index(index_CK: Tensor) -> dict[str, Any]:
    """Index as arithmetic runs [start, step, count], read by rows or by columns, whichever is shorter.

    A plain range of 2048 channels is one run, the two halves that a chunk ties are two. Deterministic, so that texts
    compare. `decode_index` undoes it.
    """
    size, width = index_CK.shape
    rows, columns = _runs(index_CK.reshape(-1).tolist()), _runs(index_CK.t().reshape(-1).tolist())
    if len(columns) < len(rows):
        return {"shape": [size, width], "columns": columns}
    return {"shape": [size, width], "rows": rows}


def decode_index(encoded: Mapping[str, Any]) -> Tensor:
    """int64 [C, K] from `encode_index`."""
    size, width = encoded["shape"]
    runs = encoded["columns"] if "columns" in encoded else encoded["rows"]
    values = torch.tensor(_flat(runs), dtype=torch.int64)
    return values.reshape(width, size).t().contiguous() if "columns" in encoded else values.reshape(size, width)


def _runs(values: list[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for value in values:
        if runs:
            start, step, count = runs[-1]
            if count == 1 or value == start + step * count:
                runs[-1] = [start, value - start if count == 1 else step, count + 1]
                continue
        runs.append([value, 0, 1])
    return runs


def _flat(runs: list[list[int]]) -> list[int]:
    return [start + step * i for start, step, count in runs for i in range(count)]


def _encode_group(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "size": group.size,
        "members": [[m.tensor, m.dim, m.role, encode_index(m.index_CK)] for m in group.members],
        "consumers": [[s.module, s.axis, encode_index(s.index_CK), s.call] for s in group.consumers],
    }


def _decode_group(document: Mapping[str, Any]) -> Group:
    return Group(
        name=document["name"],
        size=document["size"],
        members=tuple(Member(name, dim, decode_index(index), role) for name, dim, role, index in document["members"]),
        consumers=tuple(
            Site(module, axis, decode_index(index), tuple(call) if call else None)
            for module, axis, index, call in document["consumers"]
        ),
    )


def _check_index(index_CK: Tensor, what: str) -> None:
    if index_CK.dtype != torch.int64 or index_CK.dim() != 2:
        raise ValueError(f"{what}: index must be int64 [C, K], got {index_CK.dtype} {list(index_CK.shape)}.")
