"""Accuracy of several models in one pass over the images: additive sums per micro-batch, and what they mean."""

# N = rows, C = classes

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.sharding import Network
from pipeline.models.task import Place, Task

TOP_K = 5


class Evaluation(Task):
    """The sums that accuracy is made of, for each of `models`, on the same decoded images."""

    def __init__(self, networks: Mapping[str, Network], num_classes: int, reference: str | None = None) -> None:
        """
        Args:
            networks: by name; copied. Each gives logits [N, num_classes].
            num_classes: C.
            reference: name of the model that the others' predictions are compared with; None: no comparison.
        """
        if reference is not None and reference not in networks:
            raise ValueError(f"reference is {reference!r}. Known models: {', '.join(networks)}.")
        self.networks = copy.deepcopy(dict(networks))
        self.models: dict[str, nn.Module] = {}
        """The networks where they were placed."""
        self.num_classes, self.reference = num_classes, reference

    def place(self, place: Place) -> None:
        self.models = {name: place(network) for name, network in self.networks.items()}

    @torch.no_grad()
    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
        """Sums over the rows of one micro-batch, on the CPU.

        Returns: "rows" int64 scalar, "class_rows" int64 [C]; for each model "<name>/top1", "/top5" (top C with fewer
            classes) and, with a reference, "/agree" int64 scalars, "/class_correct" int64 [C], "/loss" float64 scalar
            (summed cross entropy).
        """
        C = self.num_classes
        if len(labels_N) and not 0 <= int(labels_N.min()) <= int(labels_N.max()) < C:
            raise ValueError(
                f"labels reach from {int(labels_N.min())} to {int(labels_N.max())}, the models have {C} classes. Check "
                "data.label_column and the number of classes."
            )
        logits = {name: self._logits(name, images_NCHW) for name in self.models}
        sums = {"rows": torch.tensor(len(labels_N)), "class_rows": torch.bincount(labels_N, minlength=C)}
        reference = None if self.reference is None else logits[self.reference].argmax(1)
        for name, logits_NC in logits.items():
            predicted = logits_NC.argmax(1)
            correct = predicted == labels_N
            best = logits_NC.topk(min(TOP_K, C), dim=1).indices
            sums[f"{name}/top1"] = correct.sum()
            sums[f"{name}/top5"] = (best == labels_N[:, None]).any(1).sum()
            sums[f"{name}/loss"] = F.cross_entropy(logits_NC.double(), labels_N, reduction="sum")
            sums[f"{name}/class_correct"] = torch.bincount(labels_N[correct], minlength=C)
            if reference is not None:
                sums[f"{name}/agree"] = (predicted == reference).sum()
        return {key: value.cpu() for key, value in sums.items()}

    def _logits(self, name: str, images_NCHW: Tensor) -> Tensor:
        logits_NC = self.models[name](images_NCHW)
        if logits_NC.shape != (len(images_NCHW), self.num_classes):
            raise ValueError(
                f"model '{name}' gives {tuple(logits_NC.shape)} for {len(images_NCHW)} images of {self.num_classes} "
                "classes. Check num_classes and class_subset."
            )
        if not bool(logits_NC.isfinite().all()):  # argmax would quietly predict some class
            raise ArithmeticError(f"model '{name}' gives NaN or Inf. Its weights or batch-norm statistics are broken.")
        return logits_NC


@dataclass(frozen=True)
class Metrics:
    """Accuracy of one model; fractions in 0 ... 1."""

    rows: int
    top1: float
    top5: float
    """Of the top C where there are fewer than five classes."""
    loss: float
    """Mean cross entropy in nats."""
    class_accuracy: tuple[float | None, ...]
    """top1 within each class; None for a class without rows."""
    agreement: float | None
    """Fraction of rows where the prediction equals the reference model's; None without a reference."""


def summarise(sums: Mapping[str, Tensor]) -> dict[str, Metrics]:
    """Sums of an Evaluation over any number of micro-batches -> metrics by model name."""
    rows = int(sums["rows"])
    if rows == 0:
        raise ValueError("an evaluation needs at least one row. Check data.val and evaluate.num_rows.")
    class_rows = sums["class_rows"].tolist()
    metrics = {}
    for key in sums:
        name, _, kind = key.rpartition("/")
        if kind != "top1":
            continue
        agree = sums.get(f"{name}/agree")
        correct = sums[f"{name}/class_correct"].tolist()
        metrics[name] = Metrics(
            rows=rows,
            top1=int(sums[f"{name}/top1"]) / rows,
            top5=int(sums[f"{name}/top5"]) / rows,
            loss=float(sums[f"{name}/loss"]) / rows,
            class_accuracy=tuple(c / n if n else None for c, n in zip(correct, class_rows, strict=True)),
            agreement=None if agree is None else int(agree) / rows,
        )
    return metrics
