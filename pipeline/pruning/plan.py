"""The plan: which channels of which group are kept, which residual blocks are not. Plain data to be read, compared, stored and replayed.

A plan carries all that surgery needs (members and tensor shapes), so it can be replayed without tracing again. Its JSON
has one group per line; kept channels read like page numbers: "0-15,18,20-31".
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.models.costs import Costs, Measure, count
from pipeline.models.graph import Block, Graph, Member, Size, decode_index, encode_index

FORMAT = "plan/2"


@dataclass(frozen=True)
class Budget:
    """What must remain of the dense network; exactly one of the two."""

    params: float | None = None
    """Fraction of all parameters."""
    macs: float | None = None
    """Fraction of all multiply-accumulates."""

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"Budget takes either params or macs, got params={self.params}, macs={self.macs}. "
                "Give the fraction that remains, for example Budget(params=0.5)."
            )
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                raise ValueError(
                    f"Budget.{name} ({value!r}) must lie between 0 and 1, both excluded: the fraction that remains. "
                    f"Budget({name}=0.5) keeps one half."
                )

    @property
    def measure(self) -> Measure:
        return "macs" if self.params is None else "params"

    @property
    def fraction(self) -> float:
        value = self.macs if self.params is None else self.params
        assert value is not None
        return float(value)

    def as_dict(self) -> dict[str, float]:
        return {self.measure: self.fraction}


@dataclass(frozen=True)
class PlannedGroup:
    """One group and what is kept of it."""

    name: str
    size: int
    """Channels of the dense group."""
    kept: tuple[int, ...]
    """Channels that stay, ascending; at least one, unless the group lies in blocks that are removed."""
    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.kept, self.kept[1:], strict=False))
        if not ascending or (self.kept and not 0 <= self.kept[0] <= self.kept[-1] < self.size):
            raise ValueError(
                f"group {self.name}: kept channels must ascend from 0 to at most {self.size - 1}, "
                f"got {ranges(self.kept)[:80]}."
            )
        for member in self.members:
            if len(member.index_CK) != self.size:
                raise ValueError(
                    f"group {self.name} has {self.size} channels, {member.tensor} indexes {len(member.index_CK)}."
                )

    @property
    def removed(self) -> tuple[int, ...]:
        kept = set(self.kept)
        return tuple(channel for channel in range(self.size) if channel not in kept)


@dataclass(frozen=True)
class Plan:
    """All groups of a graph with what is kept of them. `planned` makes one from a graph."""

    groups: tuple[PlannedGroup, ...]
    graph_sha256: str
    budget: dict[str, float]
    """{"params": 0.5} or {"macs": 0.5}; empty if the plan was not made for a budget."""
    criterion: str
    scope: str
    dense: Costs
    """Of the network that the budget is a fraction of: where several cuts follow each other, of the one before the first."""
    kept: Costs
    shapes: dict[str, tuple[int, ...]]
    """Dense shapes of the members' tensors: entries that no group owns stay, so their number must be known; and of those that are removed."""
    sizes: tuple[Size, ...] = ()
    """What the network's code states about channels and has to follow."""
    heads: tuple[str, ...] = ()
    """Modules whose channels go by whole heads, see `Graph.heads`."""
    blocks: tuple[Block, ...] = ()
    """Residual blocks that are removed."""

    def __post_init__(self) -> None:
        for names in ([group.name for group in self.groups], [block.key for block in self.blocks]):
            if len(set(names)) < len(names):
                raise ValueError(f"plan: group {next(n for n in names if names.count(n) > 1)} occurs twice.")
        gone = self.removed_tensors()
        for group in self.groups:
            if not group.kept and not _lies_in(gone, group.members):
                raise ValueError(
                    f"group {group.name}: plan keeps 0 of {group.size} channels; each group keeps at least 1."
                )
        for name in sorted(gone - set(self.shapes)):
            raise ValueError(f"plan: {name} of a removed block is not in plan.shapes; pass the dense shapes of all.")
        owner: dict[tuple[str, int], Tensor] = {}
        for g, group in enumerate(self.groups):
            for member in group.members:
                self._check_member(group.name, member)
                size = self.shapes[member.tensor][member.dim]
                owner_E = owner.setdefault((member.tensor, member.dim), torch.full((size,), -1, dtype=torch.int64))
                taken = owner_E[member.index_CK] >= 0
                if bool(taken.any()):
                    first = self.groups[int(owner_E[member.index_CK][taken][0])].name
                    raise ValueError(
                        f"group {group.name}: {member.tensor} dimension {member.dim} has entries of group {first}, too."
                    )
                owner_E[member.index_CK] = g

    def _check_member(self, group: str, member: Member) -> None:
        shape, where = self.shapes.get(member.tensor), f"group {group}: {member.tensor}"
        if shape is None:
            raise ValueError(f"{where} is not in plan.shapes; pass the dense shapes of all members' tensors.")
        if not 0 <= member.dim < len(shape):
            raise ValueError(f"{where} has shape {list(shape)}, the plan names dimension {member.dim}.")
        if member.index_CK.numel() == 0:
            raise ValueError(f"{where} has an index without entries.")
        low, high = int(member.index_CK.min()), int(member.index_CK.max())
        if low < 0 or high >= shape[member.dim]:
            raise ValueError(
                f"{where} has {shape[member.dim]} entries in dimension {member.dim}, the plan names {low} to {high}."
            )

    def kept_by_group(self) -> dict[str, frozenset[int]]:
        return {group.name: frozenset(group.kept) for group in self.groups}

    def removed_tensors(self) -> frozenset[str]:
        """Those that go with their block."""
        return frozenset(name for block in self.blocks for name in block.tensors)

    def slices(self) -> dict[str, dict[int, Tensor]]:
        """tensor -> dimension -> entries that stay (ascending int64); only dimensions that lose something.

        Of removed blocks, too, whose tensors a cut drops; what is inside of such a block alone loses nothing here.
        """
        masks: dict[str, dict[int, Tensor]] = {}
        for group in (group for group in self.groups if group.kept):
            removed = torch.tensor(group.removed, dtype=torch.int64)
            for member in group.members if len(removed) else ():
                dims = masks.setdefault(member.tensor, {})
                if member.dim not in dims:
                    dims[member.dim] = torch.ones(self.shapes[member.tensor][member.dim], dtype=torch.bool)
                dims[member.dim][member.index_CK[removed].reshape(-1)] = False
        return {name: {dim: mask.nonzero().reshape(-1) for dim, mask in dims.items()} for name, dims in masks.items()}

    def group(self, name: str) -> PlannedGroup:
        for group in self.groups:
            if group.name == name:
                return group
        known = ", ".join(group.name for group in self.groups) or "none"
        raise ValueError(f"no group {name!r} in this plan; known groups: {known}.")

    def diff(self, other: Plan) -> list[str]:
        """What `other` keeps differently, a line per group: "conv1: keeps 48 -> 40 of 64; drops 3-10"."""
        mine, theirs = ({group.name: group for group in plan.groups} for plan in (self, other))
        lines = [f"{name}: only in the first plan" for name in mine if name not in theirs]
        lines += [f"{name}: only in the second plan" for name in theirs if name not in mine]
        removed, removes = ({block.name for block in plan.blocks} for plan in (self, other))
        lines += [f"block {name}: is kept" for name in sorted(removed - removes)]
        lines += [f"block {name}: is removed" for name in sorted(removes - removed)]
        for name in (name for name in mine if name in theirs):
            a, b = mine[name], theirs[name]
            if (a.size, a.kept) != (b.size, b.kept):
                drops, adds = sorted({*a.kept} - {*b.kept}), sorted({*b.kept} - {*a.kept})
                changes = [f"drops {ranges(drops)}"] * bool(drops) + [f"adds {ranges(adds)}"] * bool(adds)
                lines.append(f"{name}: keeps {len(a.kept)} -> {len(b.kept)} of {b.size}; {', '.join(changes)}")
        return lines

    def sha256(self) -> str:
        """Of what is kept of what: groups, members, shapes, sizes, removed blocks. How it came about does not enter."""
        parts = [*_group_lines(self.groups), *_size_lines(self.sizes), *_block_lines(self.blocks)]
        text = "\n".join([_compact(_shapes(self.shapes)), *parts])
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical text, one group per line, after the removed blocks. The same plan gives the same text in every process."""
        head = {
            "format": FORMAT,
            "sha256": self.sha256(),
            "graph_sha256": self.graph_sha256,
            "budget": self.budget,
            "criterion": self.criterion,
            "scope": self.scope,
            "dense": asdict(self.dense),
            "kept": asdict(self.kept),
            "heads": list(self.heads),
        }
        lines = [f"{_compact(key)}: {_compact(value)}," for key, value in head.items()]
        if self.blocks:
            lines += ['"removed_blocks": [', ",\n".join(_block_lines(self.blocks)), "],"]
        lines += ['"groups": [', ",\n".join(_group_lines(self.groups)), "],"]
        lines += ['"sizes": [', ",\n".join(_size_lines(self.sizes)), "],"]
        lines += [f'"shapes": {_compact(_shapes(self.shapes))}']
        return "\n".join(["{", *lines, "}", ""])

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Undo `to_json`; what is missing, of a wrong kind, out of range or altered is a ValueError with its place."""
        return _decode(text)


def planned(
    graph: Graph,
    kept: Mapping[str, Iterable[int] | Tensor],
    *,
    removed_blocks: Collection[str] = (),
    budget: Budget | None = None,
    criterion: str = "",
    scope: str = "",
    dense: Costs | None = None,
) -> Plan:
    """The plan that keeps these channels of `graph`, with its costs; groups that are not named stay whole.

    Args:
        kept: group name -> channel indices in any order.
        removed_blocks: names of residual blocks. Of a group that lies inside of them no channel is kept, whatever `kept` says.
        dense: of the network that the budget is a fraction of; None: of the graph's own.
    """
    for name in kept:
        graph.group(name)
    blocks = tuple(block for block in graph.blocks if block.name in {graph.block(name).name for name in removed_blocks})
    gone = {name for block in blocks for name in block.tensors}
    chosen = {
        g.name: () if _lies_in(gone, g.members) else tuple(sorted(int(c) for c in kept.get(g.name, range(g.size))))
        for g in graph.groups
    }
    tensors = sorted({member.tensor for group in graph.groups for member in group.members} | gone)
    groups = tuple(PlannedGroup(group.name, group.size, chosen[group.name], group.members) for group in graph.groups)
    return Plan(
        groups=groups,
        graph_sha256=graph.sha256(),
        budget=budget.as_dict() if budget else {},
        criterion=criterion,
        scope=scope,
        dense=dense or count(graph, {}),
        kept=count(
            graph,
            {name: torch.tensor(channels, dtype=torch.int64) for name, channels in chosen.items()},
            [block.name for block in blocks],
        ),
        shapes={name: tuple(graph.shapes[name]) for name in tensors},
        sizes=graph.sizes,
        heads=graph.heads,
        blocks=blocks,
    )


def _lies_in(gone: Collection[str], members: Sequence[Member]) -> bool:
    """Do all tensors of a group go with their blocks?"""
    return bool(members) and all(member.tensor in gone for member in members)


# --- text -----------------------------------------------------------------------------------------------------------


def ranges(channels: Sequence[int]) -> str:
    """Ascending integers as "0-15,18,20-31"."""
    parts: list[str] = []
    start = 0
    for i, channel in enumerate(channels):
        if i + 1 == len(channels) or channels[i + 1] != channel + 1:
            parts.append(f"{channels[start]}-{channel}" if i > start else f"{channel}")
            start = i + 1
    return ",".join(parts)


def parse_ranges(text: str, end: int) -> tuple[int, ...]:
    """Undo `ranges`; all below `end`, which bounds what a broken text can ask for."""
    channels: list[int] = []
    for part in text.split(",") if text else ():
        if not re.fullmatch(r"[0-9]+(-[0-9]+)?", part):
            raise ValueError(f"{part!r} is neither a number nor a range like 20-31.")
        first, _, last = part.partition("-")
        if not int(first) <= int(last or first) < end:
            raise ValueError(f"{part!r} is no range of ascending numbers below {end}.")
        channels.extend(range(int(first), int(last or first) + 1))
    return tuple(channels)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False, allow_nan=False)


def _shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in shapes.items()}


def _group_lines(groups: Iterable[PlannedGroup]) -> Iterator[str]:
    """One line per group; name, size and kept first, since that is what people look for."""
    for group in groups:
        members = [[m.tensor, m.dim, m.role, encode_index(m.index_CK)] for m in group.members]
        head = f'{{"name":{_compact(group.name)},"size":{group.size},"kept":"{ranges(group.kept)}"'
        yield f'{head},"members":{_compact(members)}}}'


def _size_lines(sizes: Iterable[Size]) -> Iterator[str]:
    return (_compact(size.to_list()) for size in sizes)


def _block_lines(blocks: Iterable[Block]) -> Iterator[str]:
    return (_compact(block.to_list()) for block in blocks)


def _decode(text: str) -> Plan:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"plan: not JSON ({error}). It was cut off or edited; make the plan anew.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"plan: format is {found!r}, this version reads {FORMAT!r}. Make the plan anew.")
    shapes = {
        name: tuple(_integer(size, f"plan.shapes[{name!r}]") for size in _list(shape, f"plan.shapes[{name!r}]"))
        for name, shape in _field(document, "shapes", dict, "plan").items()
    }
    plan = Plan(
        groups=tuple(_decode_group(group, i) for i, group in enumerate(_field(document, "groups", list, "plan"))),
        graph_sha256=_field(document, "graph_sha256", str, "plan"),
        budget=_decode_budget(_field(document, "budget", dict, "plan")),
        criterion=_field(document, "criterion", str, "plan"),
        scope=_field(document, "scope", str, "plan"),
        dense=_decode_costs(document, "dense"),
        kept=_decode_costs(document, "kept"),
        shapes=shapes,
        sizes=tuple(
            _decode_size(size, f"plan.sizes[{i}]") for i, size in enumerate(_field(document, "sizes", list, "plan"))
        ),
        heads=tuple(_field(document, "heads", list, "plan")),
        blocks=tuple(
            _decode_block(block, f"plan.removed_blocks[{i}]")
            for i, block in enumerate(_list(document.get("removed_blocks", []), "plan.removed_blocks"))
        ),
    )
    if plan.sha256() != _field(document, "sha256", str, "plan"):
        raise ValueError(
            f"plan.sha256 is {document['sha256'][:12]}, its groups give {plan.sha256()[:12]}: they were edited. "
            "Make the change in code (pruning.plan.planned), which counts the costs anew."
        )
    return plan


def _decode_group(document: Any, i: int) -> PlannedGroup:
    where = f"plan.groups[{i}]"
    if not isinstance(document, dict):
        raise ValueError(f"{where} is {document!r:.60}, not an object.")
    name, size = _field(document, "name", str, where), _integer(_field(document, "size", int, where), f"{where}.size")
    where = f"{where} ({name})"
    try:
        kept = parse_ranges(_field(document, "kept", str, where), size)
    except ValueError as error:
        raise ValueError(f"{where}.kept: {error}") from error
    members = _field(document, "members", list, where)
    decoded = tuple(_decode_member(member, f"{where}.members[{j}]") for j, member in enumerate(members))
    return PlannedGroup(name, size, kept, decoded)


def _decode_member(document: Any, where: str) -> Member:
    if not isinstance(document, list) or len(document) != 4 or not isinstance(document[0], str):
        raise ValueError(f"{where} is {document!r:.60}, not [tensor, dimension, role, index].")
    tensor, dim, role, index = document
    try:
        return Member(tensor, _integer(dim, f"{where} dimension"), decode_index(index), role)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where} ({tensor}): {error}") from error


def _decode_size(document: Any, where: str) -> Size:
    try:
        return Size.from_list(document)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where} is {document!r:.60}: {error}") from error


def _decode_block(document: Any, where: str) -> Block:
    try:
        return Block.from_list(document)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is {document!r:.60}: {error}") from error


def _decode_budget(document: dict[str, Any]) -> dict[str, float]:
    unknown = set(document) - {"params", "macs"}
    if unknown:
        raise ValueError(f"plan.budget has unknown {sorted(unknown)}; known: params, macs.")
    return Budget(**document).as_dict() if document else {}


def _decode_costs(document: dict[str, Any], key: str) -> Costs:
    costs = _field(document, key, dict, "plan")
    where = f"plan.{key}"
    params, macs = (_integer(_field(costs, name, int, where), f"{where}.{name}") for name in ("params", "macs"))
    return Costs(params, macs)


def _field(document: dict[str, Any], key: str, kind: type, where: str) -> Any:
    if key not in document:
        raise ValueError(f"{where} lacks {key!r}.")
    if not isinstance(document[key], kind):
        raise ValueError(f"{where}.{key} is {document[key]!r:.60}, not {kind.__name__}.")
    return document[key]


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} is {value!r:.60}, not a list.")
    return value


def _integer(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{where} is {value!r}, not a non-negative integer.")
    return value
