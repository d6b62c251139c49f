"""Five criteria from one pass beside Torch-Pruning's passes for two: `python -m benchmarks.peers --data ROWS.parquet`.

ours    one pass of GateStatistics: what taylor, taylor_square, signed_taylor, fisher and group_fisher are computed from
taylor  GroupTaylorImportance: forward, backward, gradients of all weights kept
obdc    OBDCImportance: forward, backward for labels that the network draws itself, then the square of each row's gradient of each weight

Torch-Pruning's criteria run one after the other, over the same decoded rows, on the same network and the same single thread. Making
scores of what was collected takes milliseconds on either side; it is done once, and not timed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measuring import image_rows, in_turns, one_thread, versions
from pipeline.data.batches import Decoder, unit_batches
from pipeline.data.units import Units
from pipeline.models import zoo
from pipeline.models.trace import propagate
from pipeline.saliency.statistics import GateStatistics

NUM_CLASSES = 1000
Batches = list[tuple[Tensor, Tensor]]
"""images_NCHW, channels_last, as the networks: not slower than planes for any of the three; labels_N."""


def measure(
    data: str | None = None,
    model: str = "resnet50",
    size: int = 64,
    rows: int = 128,
    micro_batch: int = 16,
    turns: int = 3,
) -> dict[str, Any]:
    """Rows per second of each way, measured in turns.

    Args:
        data: Parquet file in Hugging Face's layout; None: made-up JPEGs.
        model: name in timm.
        size: height and width of the decoded images in pixels.
        rows: in each turn.
        micro_batch: rows in one forward and backward.
        turns: of which the median counts, after one to warm up.
    """
    with one_thread(), image_rows(data, rows) as source, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Torch-Pruning's hooks are of a kind that torch has replaced
        options: dict[str, Any] = {"micro_batch": micro_batch, "num_classes": NUM_CLASSES}
        batches = [
            (batch.images_NCHW, batch.labels_N)
            for unit in Units(source.row_groups, micro_batch)
            for batch in unit_batches(source, unit, Decoder(size), **options)
        ]
        works = {"ours": ours(model, batches), "taylor": taylor(model, batches), "obdc": obdc(model, batches)}
        seconds = in_turns(works, turns)
    return {
        "rows": rows,
        **{f"{name}_rows_per_s": rows / value for name, value in seconds.items()},
        "speed_ratio": (seconds["taylor"] + seconds["obdc"]) / seconds["ours"],
        "speed_ratio_taylor": seconds["taylor"] / seconds["ours"],
        "versions": versions("torch", "torch-pruning", "timm"),
    }


def ours(model: str, batches: Batches) -> Callable[[], None]:
    torch.manual_seed(0)
    network = zoo.build(model)
    task = GateStatistics(network, propagate(network, batches[0][0][:1]))
    task.to(torch.device("cpu"), torch.channels_last)

    def work() -> None:
        sums: dict[str, Tensor] = {}
        for images, labels in batches:
            for name, value in task(images, labels).items():
                sums[name] = sums[name] + value if name in sums else value

    return work


def taylor(model: str, batches: Batches) -> Callable[[], None]:
    importance = tp.importance.GroupTaylorImportance()
    network, pruner = _peer(model, batches, importance)

    def work() -> None:
        network.zero_grad()
        for images, labels in batches:
            F.cross_entropy(network(images), labels).backward()

    _require_scores(work, importance, pruner)
    return work


def obdc(model: str, batches: Batches) -> Callable[[], None]:
    """As Torch-Pruning's own reproduction of its paper does it: one backward for each batch, per-row gradients from hooks."""
    importance = tp.importance.OBDCImportance(num_classes=NUM_CLASSES)
    network, pruner = _peer(model, batches, importance)
    # Version 1.6.1 cannot prepare a network without attention (VainF/Torch-Pruning, issue 452): it replaces each group by the one at
    # its attention, gets None and iterates over it. Without attention the group itself is meant.
    pruner._downstream_node_as_root_if_attention = lambda group: group
    importance._prepare_model(network, pruner)

    def work() -> None:
        network.zero_grad()
        for images, _ in batches:
            logits = network(images)
            drawn = torch.multinomial(logits.detach().softmax(dim=1), 1).squeeze(1)
            F.cross_entropy(logits, drawn).backward()
            importance.step()

    _require_scores(work, importance, pruner)
    return work


def _peer(model: str, batches: Batches, importance: tp.importance.Importance) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    network = zoo.build(model).eval()
    classifier = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == NUM_CLASSES]
    pruner = tp.pruner.MagnitudePruner(network, batches[0][0][:1], importance=importance, ignored_layers=classifier)
    return network.to(memory_format=torch.channels_last), pruner


def _require_scores(work: Callable[[], None], importance: tp.importance.Importance, pruner: Any) -> None:
    """What was collected is what this importance needs: it gives scores that are numbers for every group."""
    work()
    for group in pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers):
        assert importance(group).isfinite().all(), f"Torch-Pruning gives no scores for {group[0].dep}"


if __name__ == "__main__":
    print(json.dumps(tyro.cli(measure), indent=1))
