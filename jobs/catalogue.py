"""Every kind of gradient-based pruning on one small task: the same network, budgets, epochs and recipe for all, three seeds.

    python -m jobs.catalogue                                 # about 30 minutes on two busy cores; the same command resumes
    python -m jobs.catalogue --only taylor rigl --seeds 0    # some rows

scikit-learn's 1,797 digits of 8 x 8 pixels, the last fifth for validation. Each row trains 6 epochs after the dense network: all of them as
recovery, or 3 with penalties, gates or changing masks and 3 as recovery. What remains is counted in parameters that are not zero, over
those of the dense network. Needs the extra `demo`. Every row and seed is a task of its own on the connected Ray cluster.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.execution.pool import connect
from pipeline.execution.tasks import run_tasks
from pipeline.models.graph import Graph
from pipeline.pruning import allocation
from pipeline.pruning.masks import masked
from pipeline.pruning.plan import Budget
from pipeline.pruning.sparsity import fits, weight_masks
from pipeline.pruning.surgery import cut
from pipeline.pruning.trials import trace
from pipeline.saliency import criteria
from pipeline.saliency.statistics import INPUT_KINDS, TRAINING_KINDS, WEIGHT_KINDS, accumulate, multiplied
from pipeline.training.dynamic import Masked
from pipeline.training.loop import TrainResult, train
from pipeline.training.policies import Aim, policies, scope_after
from pipeline.training.policy import MakePolicy, Movement
from pipeline.training.settings import TrainSettings

REMAINS = (0.5, 0.2, 0.1, 0.05, 0.02)
EPOCHS = 6
"""Of each row."""
DENSE_EPOCHS = 24
BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the catalogue."""

    family: str
    prunes: Literal["channels", "weights", "both"]
    criterion: tuple[str, ...]
    """For channels, and for weights where those alone are pruned."""
    method: tuple[str, ...] = ()
    """Of sparse training, in the first half of the epochs."""
    pattern: str = "unstructured"
    rounds: int = 1
    """Prune and recover so often, each time by the same part."""
    rewind: bool = False
    """Learning-rate rewinding: recover with the end of the dense network's schedule."""
    distill: float = 0.7


def _channels(family: str, *criterion: str, **more: Any) -> Entry:
    return Entry(family=family, prunes="channels", criterion=criterion, **more)


def _weights(family: str, *criterion: str, **more: Any) -> Entry:
    return Entry(family=family, prunes="weights", criterion=criterion, **more)


CATALOGUE: dict[str, Entry] = {
    "random": _channels("control, channels", "random"),
    "magnitude": _channels("control, channels", "magnitude"),
    "random weights": _weights("control, weights", "random"),
    "magnitude weights": _weights("control, weights", "magnitude"),
    "l1_sign": _weights("L1", "magnitude", method=("l1_sign",)),
    "l1_prox": _weights("L1", "magnitude", method=("l1_prox",)),
    "group_lasso": _channels("L1", "magnitude", method=("group_lasso",)),
    "bn_slimming": _channels("L1", "bn_scale", method=("bn_slimming",)),
    "growing": _channels("L1", "magnitude", method=("growing",)),
    "hard_concrete": _channels("L0", "hard_concrete", method=("hard_concrete",)),
    "hard_concrete weights": _weights("L0", "hard_concrete", method=("hard_concrete",)),
    "l0_sign": _weights("L0", "magnitude", method=("l0_sign",)),
    "gradient": _weights("connections", "gradient"),
    "snip": _weights("connections", "snip"),
    "snip_abs": _weights("connections", "snip_abs"),
    "fisher weights": _weights("connections", "fisher"),
    "movement": _weights("connections", "movement", method=("movement",)),
    "snip_abs, block:4": _weights("connections", "snip_abs", pattern="block:4"),
    "taylor": _channels("neurons", "taylor"),
    "fisher": _channels("neurons", "fisher"),
    "group_fisher": _channels("neurons", "group_fisher"),
    "cubic": _weights("dynamic", "magnitude", method=("cubic",)),
    "rigl": _weights("dynamic", "magnitude", method=("rigl",)),
    "dpf": _weights("dynamic", "magnitude", method=("dpf",)),
    "soft_filter": _channels("dynamic", "magnitude", method=("soft_filter",)),
    "taylor + magnitude": _channels("joint", "taylor", "magnitude"),
    "l1_prox + hard_concrete": _weights("joint", "hard_concrete", method=("l1_prox", "hard_concrete")),
    "taylor, then snip_abs": Entry(family="joint", prunes="both", criterion=("taylor",)),
    "taylor, 3 rounds": _channels("retraining", "taylor", rounds=3),
    "taylor, rewinding": _channels("retraining", "taylor", rewind=True),
    "taylor, no teacher": _channels("retraining", "taylor", distill=0.0),
}


# --- the task ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def network() -> nn.Module:
    """95,690 parameters for images [N, 1, 8, 8]."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        Block(64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images float32 [N, 1, 8, 8] and labels for training, then for validation."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(found.target)
    split = len(labels) * 4 // 5
    return images[:split], labels[:split], images[split:], labels[split:]


STEPS = 1797 * 4 // 5 // BATCH


def batches(seed: int, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in an order of its own, each image moved by up to one pixel."""
    images, labels, *_ = digits()
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    order = torch.randperm(len(labels), generator=generator)
    moves = torch.randint(-1, 2, (STEPS, 2), generator=generator).tolist()
    for step in range(start_step, STEPS):
        rows = order[step * BATCH : (step + 1) * BATCH]
        yield torch.roll(images[rows], moves[step], (2, 3)), labels[rows]


def fit(
    model: nn.Module,
    teacher: nn.Module | None,
    made: Sequence[MakePolicy],
    *,
    seed: int,
    epochs: int,
    entry: Entry | None = None,
) -> TrainResult:
    """The one recipe of all rows."""
    rewinding = entry is not None and entry.rewind
    settings = TrainSettings(
        epochs=epochs,
        batch_size=BATCH,
        lr=0.1 if entry is None or rewinding else 0.05,
        rewind_epochs=DENSE_EPOCHS if rewinding else None,
        weight_decay=1e-4,
        ema_decay=0.98,
        distill_weight=0.0 if entry is None else entry.distill,
        seed=seed,
        log_every_steps=STEPS,
        channels_last=False,
    )
    return train(model, teacher, partial(batches, seed), settings, steps_per_epoch=STEPS, policies=made)


def accuracy(model: nn.Module) -> float:
    *_, images, labels = digits()
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).double().mean())


def with_weights(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(state)
    return loaded.eval()


def dense(seed: int) -> dict[str, Tensor]:
    """Weights of the dense network."""
    torch.manual_seed(seed)
    return fit(network(), None, [], seed=seed, epochs=DENSE_EPOCHS).state_dict


# --- one row ----------------------------------------------------------------------------------------------------------


def row(entry: Entry, remains: float, seed: int, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Sparse training, then pruning and recovery in rounds; accuracies before the recovery and at the end."""
    teacher = with_weights(network(), weights)
    num_dense = _num_parameters(teacher)
    model, statistics, epochs = teacher, {}, EPOCHS
    if entry.method:
        epochs = EPOCHS // 2
        made = _sparse(entry, model, remains)
        result = fit(model, teacher, made, seed=seed, epochs=EPOCHS - epochs, entry=entry)
        model, statistics = with_weights(model, result.state_dict), result.statistics
    for i in range(entry.rounds):
        target = math.floor(num_dense * remains ** ((i + 1) / entry.rounds))
        model, masks = pruned(entry, model, statistics, target, seed)
        before = accuracy(model)
        made = [partial(Masked, masks=masks)] if masks else []
        state = fit(model, teacher, made, seed=seed, epochs=epochs // entry.rounds, entry=entry).state_dict
        model = with_weights(model, state)
    left = _num_parameters(model) - sum(int((~mask).sum()) for mask in masks.values())
    return {"before": before, "after": accuracy(model), "remains": left / num_dense, "dense": accuracy(teacher)}


def pruned(
    entry: Entry, model: nn.Module, statistics: Mapping[str, Tensor], target: int, seed: int
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network with at most `target` parameters that are not zero, and its masks."""
    graph, num = traced(model), _num_parameters(model)
    stored = {**_scored(entry, model, graph), **statistics}
    plan = None
    if entry.prunes != "weights":
        rule, fraction = criteria.rule("channels", *entry.criterion), target / num
        if entry.prunes == "both":
            fraction **= 0.5
        saliency, scope = rule.fn(graph, stored, model.state_dict(), seed), scope_after(entry.method, rule.scope)
        plan = allocation.plan(graph, saliency, Budget(params=fraction), criterion=rule.name, scope=scope, round_to=1)
        model = cut(model, plan)
    if entry.prunes == "channels":
        return model, {}
    rule = criteria.rule("weights", *(("snip_abs",) if entry.prunes == "both" else entry.criterion))
    if entry.prunes == "both":
        graph = traced(model)
        stored = accumulate(model, graph, _scoring_batches(), weights=True)
    names = maskable(model, graph, entry.pattern)
    scores = {name: rule.fn(name, stored, model.state_dict(), seed) for name in names}
    others = _num_parameters(model) - sum(score.numel() for score in scores.values())
    masks = weight_masks(scores, pattern=entry.pattern, num_keep=target - others, scope=rule.scope)
    return masked(model, masks), masks


def _scored(entry: Entry, model: nn.Module, graph: Graph) -> dict[str, Tensor]:
    rule = criteria.rule("weights" if entry.prunes == "weights" else "channels", *entry.criterion)
    needs = {*rule.needs} - {*TRAINING_KINDS}
    if not needs:
        return {}
    kinds = {"weights": bool(needs & {*WEIGHT_KINDS}), "inputs": bool(needs & {*INPUT_KINDS})}
    return accumulate(model, graph, _scoring_batches(), **kinds)


def _scoring_batches() -> Iterator[tuple[Tensor, Tensor]]:
    images, labels, *_ = digits()
    return zip(images.split(64), labels.split(64), strict=True)


def _sparse(entry: Entry, model: nn.Module, remains: float) -> list[MakePolicy]:
    """The policies of the first half, which aim at the row's budget."""
    if entry.method == ("movement",):
        return [Movement]
    graph, num = traced(model), _num_parameters(model)
    names = maskable(model, graph, entry.pattern)
    total = sum(model.get_parameter(name).numel() for name in names)
    budget = Budget(params=remains) if entry.prunes == "channels" else None
    plan_of = None
    if budget is not None:
        plan_of = partial(allocation.plan, graph, budget=budget, criterion="magnitude_l2", scope="layer", round_to=1)
    aim = Aim(
        graph=graph,
        budget=budget,
        plan_of=plan_of,
        names=names,
        pattern=None if budget else entry.pattern,
        keep=None if budget else (math.floor(remains * num) - (num - total)) / total,
        scope=criteria.rule("weights", "magnitude").scope,
        every=10,
    )
    return policies(entry.method, (), aim)


def traced(model: nn.Module) -> Graph:
    return trace(model, torch.zeros(1, 1, 8, 8))


def maskable(model: nn.Module, graph: Graph, pattern: str) -> list[str]:
    return [name for name, weight in multiplied(model, graph).items() if fits(weight.shape, pattern)]


def _num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- all rows ---------------------------------------------------------------------------------------------------------

Result = dict[str, Any]
"""entry, budget, seed, and what `row` returns."""


def run(names: Sequence[str], budgets: Sequence[float], seeds: Sequence[int], lines: Path) -> list[Result]:
    """What has no line yet is computed on the cluster, one task for each row, and appended as it comes."""
    done = (
        {(r["entry"], r["budget"], r["seed"]): r for r in map(json.loads, lines.read_text().splitlines())}
        if lines.exists()
        else {}
    )
    keys = [(name, budget, seed) for name in names for budget in budgets for seed in seeds]
    todo = [key for key in keys if key not in done]
    weights = dict(run_tasks(dense, {seed: (seed,) for seed in sorted({seed for *_, seed in todo})}))
    arguments = {(name, budget, seed): (CATALOGUE[name], budget, seed, weights[seed]) for name, budget, seed in todo}
    with lines.open("a") as file:
        for number, (key, found) in enumerate(run_tasks(row, arguments), 1):
            name, budget, seed = key
            done[key] = {"entry": name, "budget": budget, "seed": seed, **found}
            file.write(json.dumps(done[key]) + "\n")
            file.flush()
            print(f"[{number}/{len(todo)}] {name}, {budget:g} remains, seed {seed}: {found['after']:.1%}", flush=True)
    return [done[key] for key in keys]


def summarised(results: Sequence[Result]) -> dict[str, dict[float, tuple[float, float]]]:
    """Entry -> budget -> mean and standard deviation of the final accuracy over the seeds, in per cent."""
    found: dict[str, dict[float, tuple[float, float]]] = {}
    for name in dict.fromkeys(r["entry"] for r in results):
        for budget in dict.fromkeys(r["budget"] for r in results):
            values = [100 * r["after"] for r in results if (r["entry"], r["budget"]) == (name, budget)]
            if values:
                found.setdefault(name, {})[budget] = (mean(values), stdev(values) if len(values) > 1 else 0.0)
    return found


def table(results: Sequence[Result]) -> str:
    """Markdown: one row for each entry, one column for each budget, families together."""
    figures = summarised(results)
    budgets = sorted({r["budget"] for r in results}, reverse=True)
    head = "| family | entry | prunes | " + " | ".join(f"{b:.0%}" for b in budgets) + " |"
    lines = [head, "|---" * (3 + len(budgets)) + "|"]
    for name, by_budget in figures.items():
        entry = CATALOGUE[name]
        cells = [f"{by_budget[b][0]:.1f} ± {by_budget[b][1]:.1f}" if b in by_budget else "" for b in budgets]
        lines.append(f"| {entry.family} | `{name}` | {entry.prunes} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: Sequence[Result], path: Path) -> None:
    """Accuracy against what remains, one panel for each family, beside the controls of what it prunes in grey."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "catalogue"})  # small, and the same each time
    from matplotlib import pyplot

    figures = summarised(results)
    families = [f for f in dict.fromkeys(CATALOGUE[name].family for name in figures) if not f.startswith("control")]
    controls = [name for name in figures if CATALOGUE[name].family.startswith("control")]
    columns = min(4, len(families))
    num_rows = -(-len(families) // columns)
    figure, axes = pyplot.subplots(
        num_rows, columns, figsize=(3.6 * columns, 3.2 * num_rows), sharex=True, sharey=True, squeeze=False
    )
    for axis, family in zip(axes.flat, families, strict=False):
        own = [name for name in figures if CATALOGUE[name].family == family]
        kinds = {CATALOGUE[name].prunes for name in own}
        for name in [*(name for name in controls if CATALOGUE[name].prunes in kinds), *own]:
            xs, (ys, spread) = list(figures[name]), zip(*figures[name].values(), strict=True)
            style = (
                {"color": "0.7", "linestyle": ":" if "random" in name else "--"}
                if name in controls
                else {"marker": "."}
            )
            axis.errorbar(xs, ys, yerr=spread, label=name, capsize=2, linewidth=1.2, **style)
        axis.set(title=family, xscale="log")
        axis.set_xticks(list(REMAINS), [f"{b:.0%}" for b in REMAINS], minor=False)
        axis.tick_params(axis="x", which="minor", labelbottom=False)
        axis.legend(fontsize=6, loc="lower right")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(families) :]:
        axis.set_visible(False)
    figure.supxlabel("parameters that are not zero")
    figure.supylabel("top-1, %")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CATALOGUE, default=list(CATALOGUE), metavar="ENTRY")
    parser.add_argument("--budgets", nargs="+", type=float, default=list(REMAINS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/catalogue"), help="results.jsonl, table.md, plot.svg")
    parser.add_argument("--address", help="Ray cluster to join; empty: the one of this job, or a local one")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    connect(options.address)
    results = run(options.only, options.budgets, options.seeds, options.out / "results.jsonl")
    (options.out / "table.md").write_text(table(results))
    plot(results, options.out / "plot.svg")
    print(table(results))


if __name__ == "__main__":
    from jobs import catalogue  # tasks find what they run by its module's name, which is not that of a script

    catalogue.main()
