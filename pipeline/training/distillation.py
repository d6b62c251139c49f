"""The loss of a student: labels, and the logits of the network that it was cut from."""

# N = rows, C = classes

from __future__ import annotations

import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor


def label_loss(logits_NC: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean cross entropy against class indices (int64 [N], smoothed) or class distributions (float [N, C], as they
    are).
    """
    if labels.is_floating_point():
        return SoftTargetCrossEntropy()(logits_NC, labels)
    return LabelSmoothingCrossEntropy(smoothing)(logits_NC, labels)


def distillation_loss(student_NC: Tensor, teacher_NC: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student), both softened by the temperature T; mean over rows.

    The factor T^2 keeps the size of the gradient independent of T.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    if student_NC.shape != teacher_NC.shape:
        raise ValueError(
            f"the student has logits of shape {tuple(student_NC.shape)}, its teacher {tuple(teacher_NC.shape)}. "
            "Both need the same classes; set distill_weight to 0 to train on labels alone."
        )
    student = F.log_softmax(student_NC / temperature, dim=1)
    teacher = F.log_softmax(teacher_NC / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def student_loss(
    logits_NC: Tensor, labels: Tensor, teacher_NC: Tensor | None, *, smoothing: float, weight: float, temperature: float
) -> Tensor:
    """(1 - weight) * label loss + weight * distillation loss; mean over rows, computed in float32."""
    logits_NC = logits_NC.float()
    hard = label_loss(logits_NC, labels, smoothing)
    if teacher_NC is None:
        return hard
    return (1 - weight) * hard + weight * distillation_loss(logits_NC, teacher_NC.float(), temperature)
