"""Trial cuts: what label propagation says about channel groups is tried out before anybody relies on it.

Random subsets of all groups, with another ratio for each group, are really cut from a copy with random weights, and
the cut copy is compared with the masked one. Where it crashes or differs, the guilty groups are found and frozen,
each with its reason; then the trials start again, until enough of them in a row pass.

Why another ratio for each group: two groups of equal size that only Python ties (`reshape(B, C, -1)` with the C of
another tensor) pass when both lose 30 %, and crash when they do not. Why random weights: zero-initialised scales hide
what lies behind them. Why float64: a mistake stands out from rounding by many orders of magnitude, however deep the
network.

Residual blocks are tried last, each time together with another random cut of channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.costs import count
from pipeline.models.graph import Block, Frozen, Graph, Size
from pipeline.models.standalone import open_attention_, original_class
from pipeline.models.trace import Deadline, find_blocks, propagate
from pipeline.pruning.bench import Bench, Failure
from pipeline.pruning.plan import Plan, planned

MIN_REMOVED, MAX_REMOVED = 0.05, 0.8
"""Range of the fraction of channels that a group loses in a trial."""
OPERATION = "trial cut"
"""`Frozen.operation` of what trials have frozen."""

Kept = Mapping[str, tuple[int, ...]]


def trace(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    seed: int = 0,
    num_trials: int = 3,
    time_limit_s: float = 1200,
    blocks: bool = False,
) -> Graph:
    """Channel groups of `model`: label propagation, then trial cuts. The model computes what it did before; its modules of
    class nn.MultiheadAttention get one that does not tie the heads to the embedding (`models.standalone`).

    Args:
        example_inputs: one batch that the network accepts, float [N, C, H, W] for images; its size decides the MACs.
        seed: of the trials' weights, inputs and subsets.
        num_trials: trials in a row that have to pass.
        time_limit_s: for all of it; on one thread ResNet-152 takes about 15 s at 224 px.
        blocks: look for residual blocks that can go as a whole, too.

    Raises:
        ValueError: the network does not run on `example_inputs`.
        TraceTimeout: it was not done in time.
    """
    deadline = Deadline.after(time_limit_s)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    graph = _propagate(open_attention_(model), inputs, deadline)
    return try_cuts(model, graph, inputs, seed=seed, num_trials=num_trials, deadline=deadline, blocks=blocks)


def _propagate(model: nn.Module, inputs: tuple[Tensor, ...], deadline: Deadline) -> Graph:
    """On one row, if the network takes that: trials run several, so a number that holds for one row only is found out."""
    num_rows = {len(tensor) for tensor in inputs if tensor.dim()}
    if len(num_rows) == 1 and num_rows != {1}:
        with suppress(ValueError):
            return propagate(
                model, tuple(tensor[:1] if tensor.dim() else tensor for tensor in inputs), deadline=deadline
            )
    return propagate(model, inputs, deadline=deadline)


def try_cuts(
    model: nn.Module,
    graph: Graph,
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    seed: int = 0,
    num_trials: int = 3,
    deadline: Deadline | None = None,
    blocks: bool = False,
) -> Graph:
    """`graph` without the groups that trial cuts find guilty, which stand among the frozen with what went wrong, and with
    those sizes alone that have to be brought up to date; on request with the residual blocks that can go."""
    if num_trials < 1:
        raise ValueError(f"num_trials ({num_trials}) must be at least 1: a graph that was never tried is a guess.")
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    bench: Bench | None = None
    passed, trial = 0, 0
    candidates, graph = graph.sizes, replace(graph, sizes=())
    checked: tuple[Size, ...] = ()  # sizes that are known to leave the dense network as it is
    while passed < num_trials and any(group.size > 1 for group in graph.groups):
        bench = bench or Bench(model, inputs, seed, macs=count(graph, {}).macs, deadline=deadline)
        kept = random_subsets(graph, seed=seed, trial=trial)
        bench.training = passed == num_trials - 1
        failure = bench.attempt(planned(graph, kept))
        more = needed(model, failure, [size for size in candidates if size not in graph.sizes]) if failure else []
        if not more and checked != graph.sizes:
            checked = tuple(_harmless(bench, graph))
            if checked != graph.sizes:
                candidates = tuple(size for size in candidates if size in checked or size not in graph.sizes)
                graph, passed = replace(graph, sizes=checked), 0
                continue
        if failure is None:
            passed, trial = passed + 1, trial + 1
            bench.draw(trial)
            continue
        passed = 0
        if more:
            graph = replace(graph, sizes=(*graph.sizes, *more))
            continue
        guilty = {
            name: _frozen(name, graph.group(name).size, name, failure)
            for name, failure in _guilty(bench, list(kept), _plan_of_groups(graph, kept)).items()
        }
        candidates = tuple(size.without(guilty) for size in candidates)
        graph, checked, trial = replace(graph.without(guilty), sizes=()), (), trial + 1
    if not blocks:
        return graph
    bench = bench or Bench(model, inputs, seed, macs=count(graph, {}).macs, deadline=deadline)
    return _try_blocks(bench, replace(graph, blocks=find_blocks(bench.model, bench.inputs)), num_trials)


def _try_blocks(bench: Bench, graph: Graph, num_trials: int) -> Graph:
    """`graph`, whose groups have passed their trials, with those of its blocks that can go: all at once, and random halves of
    them, together with random cuts of the groups. The others stand among the frozen with what went wrong."""
    passed, trial = 0, 0
    while passed < num_trials and graph.blocks:
        kept = random_subsets(graph, seed=bench.seed, trial=trial)
        chosen = random_blocks(graph.blocks, seed=bench.seed, trial=trial) if passed else graph.blocks
        bench.training = passed == num_trials - 1
        trial += 1
        names = [block.name for block in chosen]
        if bench.attempt(planned(graph, kept, removed_blocks=names)) is None:
            passed += 1
            continue
        passed = 0
        guilty = _guilty(bench, names, _plan_of_blocks(graph, kept))
        found = {graph.block(name): failure for name, failure in guilty.items()}
        graph = graph.without({b.key: _frozen(b.key, 1, b.name, failure) for b, failure in found.items()})
    return graph


def random_blocks(blocks: Sequence[Block], *, seed: int, trial: int = 0) -> list[Block]:
    """Half of the blocks, at random, in running order."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + trial)
    chosen = torch.randperm(len(blocks), generator=generator)[: (len(blocks) + 1) // 2]
    return [blocks[b] for b in sorted(chosen.tolist())]


def needed(model: nn.Module, failure: Failure, sizes: Sequence[Size]) -> list[Size]:
    """Sizes to bring up to date after a failure: those that the call stated which stopped, in all modules that run the same
    code; else those in its function, from the innermost outwards; else all."""
    classes = {path: original_class(module) for path, module in model.named_modules()}
    for whole_function in (False, True):
        for frame in failure.frames:
            found = [
                size
                for size in sizes
                if (classes[size.module], size.functions[-1]) == (frame.owner, frame.function)
                and (whole_function or frame.first_line <= size.line <= frame.last_line)
            ]
            if found:
                return found
    return list(sizes)


def _harmless(bench: Bench, graph: Graph) -> list[Size]:
    """Sizes of the graph that leave the dense network as it is: what a place states may also depend on the number of rows, or
    of pixels."""

    def passes(tried: Sequence[Size]) -> bool:
        return bench.keeps_dense(planned(replace(graph, sizes=tuple(tried)), {}))

    if passes(graph.sizes):
        return list(graph.sizes)
    by_place: dict[tuple[Any, ...], list[Size]] = {}
    for size in graph.sizes:
        by_place.setdefault((size.functions, size.line, size.column, size.text), []).append(size)
    return [size for same in by_place.values() if passes(same) for size in same]


def random_subsets(graph: Graph, *, seed: int, trial: int = 0) -> dict[str, tuple[int, ...]]:
    """Group -> channels kept, at random; groups of one channel stay whole and are left out.

    Groups of equal size get fractions from different strata of the range, so that as few of them as possible keep the
    same number of channels by chance.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + trial)
    by_size: dict[int, list[str]] = {}
    for group in graph.groups:
        if group.size > 1:
            by_size.setdefault(group.size, []).append(group.name)
    kept = {}
    for size, names in by_size.items():
        order = torch.randperm(len(names), generator=generator)
        strata = (order + torch.rand(len(names), generator=generator)) / len(names)
        for name, fraction in zip(names, (MIN_REMOVED + strata * (MAX_REMOVED - MIN_REMOVED)).tolist(), strict=True):
            removed = round(size * fraction)
            num_kept = size - min(max(removed, 1), size - 1)
            chosen = torch.randperm(size, generator=generator)[:num_kept]
            kept[name] = tuple(chosen.sort().values.tolist())
    return kept


# --- the search for the guilty ----------------------------------------------------------------------------------------


def _guilty(bench: Bench, rest: Sequence[str], plan_of: Callable[[Sequence[str]], Plan]) -> dict[str, Failure]:
    """Groups, or blocks, without which this trial passes, each with what went wrong when it was added to those that pass.

    Binary search for one whose addition makes the trial fail: about log2(groups) cuts for each guilty one, and it
    needs no assumption about which of them interact.
    """
    guilty: dict[str, Failure] = {}
    innocent: list[str] = []  # cut together, these pass

    def attempt(names: Sequence[str], *, explain: bool = False) -> Failure | None:
        return bench.attempt(plan_of(names), explain=explain)

    while rest and attempt([*innocent, *rest]):
        passes, fails = 0, len(rest)  # how many of the rest, added to the innocent, pass and fail
        while fails - passes > 1:
            middle = (passes + fails) // 2
            passes, fails = (passes, middle) if attempt([*innocent, *rest[:middle]]) else (middle, fails)
        name = rest[passes]
        innocent, rest = [*innocent, *rest[:passes]], rest[fails:]
        failure = attempt([*innocent, name], explain=True)
        guilty[name] = failure or Failure("the trial gives other results each time", "")
    return guilty


def _plan_of_groups(graph: Graph, kept: Kept) -> Callable[[Sequence[str]], Plan]:
    """Cuts these groups alone."""
    return lambda names: planned(graph, {name: kept[name] for name in names})


def _plan_of_blocks(graph: Graph, kept: Kept) -> Callable[[Sequence[str]], Plan]:
    """Cuts all groups, and removes these blocks."""
    return lambda names: planned(graph, kept, removed_blocks=names)


def _frozen(name: str, size: int, where: str, failure: Failure) -> Frozen:
    return Frozen(name, size, OPERATION, failure.where or where, failure.error)
