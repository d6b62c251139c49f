"""From classes of slots to a Graph: classes over the same dimensions are the channels of one group.

# C = channels of a group, K = entries of one channel along one dimension
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from pipeline.models.graph import Contraction, Frozen, Graph, Group, Member, Site, Size
from pipeline.models.trace.labels import Ids, Reason, Slots
from pipeline.models.trace.sizes import Stated

if TYPE_CHECKING:
    from pipeline.models.trace.tracer import Trace

Dimension = tuple[str, int]
SiteKey = tuple[str, int, tuple[int, int, str] | None]
"""(module, axis, call), see `models.graph.Site`."""
NO_READER = "no convolution or linear layer reads these channels"
NO_WRITER = "no convolution or linear layer writes these channels"


@dataclass(frozen=True, slots=True)
class _Set:
    """Classes that own equally many entries of the same dimensions, in the order of their channels."""

    dimensions: tuple[Dimension, ...]
    leading: Dimension
    """The first that a contraction writes, or else reads; it orders the channels and names them."""
    classes: list[int]
    entries: Mapping[int, Mapping[Dimension, list[int]]]

    def index(self, dimension: Dimension, classes: list[int]) -> torch.Tensor:
        """int64 [C, K]."""
        return torch.tensor([self.entries[one][dimension] for one in classes], dtype=torch.int64)


def graph_of(model: nn.Module, trace: Trace, input_shape: tuple[int, ...]) -> Graph:
    """The Graph of a finished trace of a batch of input_shape[0] rows."""
    slots, reasons = trace.slots, trace.slots.reasons()
    positions = _positions_by_class(slots, trace.sites)
    groups: list[Group] = []
    frozen: list[Frozen] = []
    taken: dict[str, int] = {}
    channel_of: dict[int, tuple[str, int]] = {}
    for found in _sets(slots):
        name = _name(found, slots, taken)
        stays: dict[Reason, list[int]] = defaultdict(list)
        free = []
        for one in found.classes:
            reason = reasons.get(one, trace.refused)
            if reason is None:
                free.append(one)
            else:
                stays[reason].append(one)
        group = _group(name, found, free, slots, positions) if free else None
        if (
            isinstance(group, Group)
            and group.size == 1
            and sum(m.index_CK.shape[1] for m in group.members) > len(group.members)
        ):
            group = Reason("one channel", name, "all these entries can only go together, so none can be spared")
        if isinstance(group, Reason):
            stays[group] += free
        elif group is not None:
            groups.append(group)
            channel_of |= {one: (name, channel) for channel, one in enumerate(free)}
        frozen += [Frozen(name, len(c), reason.operation, reason.where, reason.text) for reason, c in stays.items()]
    known = {member.tensor for group in groups for member in group.members} | {f.group for f in frozen}
    frozen += _rest(model, slots, known)
    shapes = {name: tuple(t.shape) for name, t in model.named_parameters(remove_duplicate=False)}
    shapes |= {name: tuple(t.shape) for name, t in model.named_buffers(remove_duplicate=False)}
    rows = input_shape[0]
    contractions = [
        Contraction(weight, -(-count // (int(np.prod(shapes[weight])) * rows))) for weight, count in trace.macs.items()
    ]
    return Graph(
        groups=tuple(groups),
        frozen=tuple(frozen),
        contractions=tuple(contractions),
        shapes=shapes,
        parameters=tuple(name for name, _ in model.named_parameters()),
        input_shape=input_shape,
        sizes=_sizes(slots, trace.stated, channel_of),
        heads=tuple(sorted(trace.attention)),
    )


def _sizes(slots: Slots, stated: Sequence[Stated], channel_of: Mapping[int, tuple[str, int]]) -> tuple[Size, ...]:
    """What the code states about channels that can be cut; what one place states about several kinds of them cannot follow.

    An attribute that is read with several meanings stays: each place that reads it states its own number. So does an
    expression that calls are given in several places: what a place was seen to state counts, not what it repeats.
    """
    seen = {one.place for one in stated if not one.repeats}
    places: dict[tuple[Any, ...], set[tuple[Any, ...]]] = defaultdict(set)
    attributes: dict[tuple[str, str, int | None], set[tuple[Any, ...]]] = defaultdict(set)
    by_ids: dict[tuple[int, ...], tuple[dict[str, tuple[int, ...]], int]] = {}
    for one in stated:
        if one.repeats and one.place in seen:
            continue
        if one.ids not in by_ids:
            by_ids[one.ids] = _counted(slots, one.ids, channel_of)
        channels, fixed = by_ids[one.ids]
        if not channels and any(one.ids):
            continue  # positions, not channels
        meaning = (tuple(channels.items()), fixed, one.negative)
        attributes[one.module, one.attribute, one.element].add(meaning)
        places[*one.place, one.attribute, one.element].add(meaning)
    found: dict[tuple[Any, ...], Size] = {}
    for (module, functions, line, column, text, attribute, element), meanings in places.items():
        if len(meanings) > 1:
            continue
        ((channels, fixed, negative),) = meanings
        if not channels and attribute:
            continue
        own = attribute if len(attributes[module, attribute, element]) == 1 else ""
        if element is not None and not own:
            continue
        size = Size(module, own, element, functions, line, column, text, dict(channels), fixed, negative)
        found[(module, own, element) if own else (module, functions, line, column, text)] = size
    return tuple(found.values())


def _counted(
    slots: Slots, ids: tuple[int, ...], channel_of: Mapping[int, tuple[str, int]]
) -> tuple[dict[str, tuple[int, ...]], int]:
    """Group -> channel of each of these positions, and how many belong to none."""
    channels: dict[str, list[int]] = defaultdict(list)
    for one in slots.find(np.array(ids)).tolist():
        if one in channel_of:
            name, channel = channel_of[one]
            channels[name].append(channel)
    return {name: tuple(found) for name, found in channels.items()}, len(ids) - sum(map(len, channels.values()))


def _sets(slots: Slots) -> list[_Set]:
    """Sets that a contraction writes or reads, in running order; kernel positions alone are of no interest."""
    entries: dict[int, dict[Dimension, list[int]]] = defaultdict(lambda: defaultdict(list))
    for dimension, ids in slots.classes():
        for index, one in enumerate(ids.tolist()):
            entries[one][dimension].append(index)
    by_signature: dict[tuple[tuple[Dimension, int], ...], list[int]] = defaultdict(list)
    for one, owned in entries.items():
        by_signature[tuple((dimension, len(indices)) for dimension, indices in owned.items())].append(one)
    order = {dimension: (slots.roles[dimension] != "out", i) for i, dimension in enumerate(slots.roles)}
    sets = []
    for signature, classes in by_signature.items():
        dimensions = tuple(dimension for dimension, _ in signature)
        leading = min((d for d in dimensions if d in order), key=order.__getitem__, default=None)
        if leading is not None:
            ranked = sorted((entries[one][leading][0], one) for one in classes)
            sets.append(_Set(dimensions, leading, [one for _, one in ranked], entries))
    return sorted(sets, key=lambda s: (order[s.leading], entries[s.classes[0]][s.leading][0]))


def _name(found: _Set, slots: Slots, taken: dict[str, int]) -> str:
    """Module of the leading producer; channels that the network only reads are "<module>.input"."""
    tensor = found.leading[0]
    name = tensor.rpartition(".")[0] or tensor
    if slots.roles[found.leading] != "out":
        name += ".input"
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}#{taken[name]}"


def _positions_by_class(slots: Slots, sites: Mapping[SiteKey, Ids]) -> dict[SiteKey, dict[int, list[int]]]:
    """Site -> class -> positions along the site's axis."""
    result: dict[SiteKey, dict[int, list[int]]] = {}
    for site, ids in sites.items():
        found: dict[int, list[int]] = defaultdict(list)
        for position, one in enumerate(slots.find(ids).tolist()):
            if one:
                found[one].append(position)
        result[site] = found
    return result


def _group(
    name: str,
    found: _Set,
    classes: list[int],
    slots: Slots,
    positions: Mapping[SiteKey, Mapping[int, list[int]]],
) -> Group | Reason:
    """The group of these classes, or why they are none."""
    roles = [slots.roles.get(dimension, "affine") for dimension in found.dimensions]
    consumers = []
    for (module, axis, call), by_class in positions.items():
        if by_class.keys().isdisjoint(classes):
            continue
        rows = [by_class.get(one, []) for one in classes]
        if len({len(row) for row in rows}) > 1:
            return Reason("layout", module, "the channels do not own equally many entries of the layer's input")
        consumers.append(Site(module, axis, torch.tensor(rows, dtype=torch.int64), call))
    if "out" not in roles or not consumers:
        return Reason("no contraction", name, NO_READER if "out" in roles else NO_WRITER)
    members = [
        Member(tensor, dim, found.index((tensor, dim), classes), role)
        for (tensor, dim), role in zip(found.dimensions, roles, strict=True)
    ]
    return Group(name, len(classes), tuple(members), tuple(consumers))


def _rest(model: nn.Module, slots: Slots, known: set[str]) -> list[Frozen]:
    """Weights about which nothing else is said: no contraction takes part in them, or the traced forward never touched them."""
    used = {tensor for tensor, _ in slots.dimensions}
    reasons = slots.reasons()
    found = []
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0] or name
        if parameter.dim() < 2 or name in known or any(key[0] == name for key in slots.roles):
            continue
        if name not in used:
            found.append(Frozen(module, parameter.shape[0], "unused", name, "the traced forward does not use it"))
            continue
        own = [
            slots.find(slots.of(name, dim, size))
            for dim, size in enumerate(parameter.shape)
            if (name, dim) in slots.dimensions
        ]
        why = next((reasons[one] for ids in own for one in ids.tolist() if one in reasons), None)
        if why is not None:
            found.append(Frozen(module, parameter.shape[0], why.operation, why.where, why.text))
    return found
