"""Rules for single weights: pure functions from stored statistics to a score for each entry of one tensor.

# B = micro-batches, w = the weight, g_b = gradient of the summed loss of micro-batch b

A rule sees one tensor at a time, so that a network of any size is scored in the memory of its largest layer. Higher = keep.
Scores of loss-based rules are in units of the loss of one row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pipeline.saliency.reading import num_rows, statistic, weight_of

Statistics = Mapping[str, Tensor]
Weights = Mapping[str, Tensor]


def magnitude(tensor: str, statistics: Statistics, weights: Weights, seed: int) -> Tensor:
    """|w|. Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NIPS 2015."""
    return weight_of(weights, tensor).abs()


def random(tensor: str, statistics: Statistics, weights: Weights, seed: int) -> Tensor:
    """Uniform on [0, 1): the control. Only the seed and the tensor's name decide."""
    return uniform(f"{seed}/{tensor}", tuple(weight_of(weights, tensor).shape))


def uniform(key: str, shape: tuple[int, ...]) -> Tensor:
    """float64 of this shape, drawn from a key: the same in every process."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return torch.from_numpy(generator.random(shape))


def gradient(tensor: str, statistics: Statistics, weights: Weights, seed: int) -> Tensor:
    """sum_b |g_b| / rows: how strongly the loss pulls at the weight, whichever way. Baseline of the literature on SNIP."""
    return _per_row(statistics, "grad_abs", tensor)


def snip(tensor: str, statistics: Statistics, weights: Weights, seed: int) -> Tensor:
    """|w * sum_b g_b| / rows: the first-order change of the mean loss when the weight is zeroed; batches may cancel.

    Source: Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019, equation 5.
    """
    return (weight_of(weights, tensor) * _per_row(statistics, "grad_sum", tensor)).abs()


def snip_abs(tensor: str, statistics: Statistics, weights: Weights, seed: int) -> Tensor:
    """sum_b |w * g_b| / rows: the same with the absolute value before the sum, so that batches cannot cancel.

    Source: Lee et al. (ICLR 2019); absolute value per example as in Molchanov et al., ICLR 2017.
    """
    return weight_of(weights, tensor).abs() * _per_row(statistics, "grad_abs", tensor)


def fisher(tensor: str, statistics: Statistics, weights: Weights, seed: int) -> Tensor:
    """w^2 / 2 * sum_b g_b^2 / rows: second-order rise of the loss with the empirical Fisher's diagonal as curvature, by micro-batch.

    For one row per micro-batch it is the diagonal itself; larger ones add B times the squared mean gradient, which vanishes at a minimum.

    Source: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018; diagonal form of Singh and Alistarh,
    "WoodFisher", NeurIPS 2020.
    """
    return weight_of(weights, tensor).square() * _per_row(statistics, "grad_square", tensor) / 2


def obd(tensor: str, statistics: Statistics, weights: Weights, seed: int) -> Tensor:
    """w^2 / 2 * h, with h the diagonal of the mean loss's Hessian; may be negative where the loss curves down.

    Source: LeCun, Denker, Solla, "Optimal Brain Damage", NIPS 1989, equation 5; h by Hutchinson's estimator (saliency/curvature.py).
    """
    return weight_of(weights, tensor).square() * _per_row(statistics, "hessian_diag", tensor) / 2


def grasp(tensor: str, statistics: Statistics, weights: Weights, seed: int) -> Tensor:
    """w * (H g): how much of the gradient's norm is lost with the weight; negative for those whose removal makes it grow.

    Source: Wang, Zhang, Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020, equation 8. Their
    score is the negative of this one, and they remove the largest.
    """
    return weight_of(weights, tensor) * _per_row(statistics, "hessian_grad", tensor)


def movement(tensor: str, statistics: Statistics, weights: Weights, seed: int) -> Tensor:
    """-sum over training steps of w * g: positive for weights that training moved away from zero.

    Source: Sanh, Wolf, Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", NeurIPS 2020, section 4.
    """
    return statistic(statistics, f"movement/{tensor}").double()


def hard_concrete(tensor: str, statistics: Statistics, weights: Weights, seed: int) -> Tensor:
    """Probability that the weight's gate is open, from training with the method hard_concrete.

    Source: Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", ICLR 2018, equation 12.
    """
    return statistic(statistics, f"gate_open/{tensor}").double()


def lamp(tensor: str, statistics: Statistics, weights: Weights, seed: int) -> Tensor:
    """w^2 over the sum of squares of all weights of the layer that are not smaller: comparable between layers.

    Of equal weights the first index counts as the larger, so that every score is its own.

    Source: Lee et al., "Layer-Adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021, equation 4.
    """
    square = weight_of(weights, tensor).square()
    falling, order = square.reshape(-1).sort(descending=True, stable=True)
    score = torch.where(falling > 0, falling / falling.cumsum(0), 0.0)
    return torch.empty_like(score).scatter_(0, order, score).reshape(square.shape)


def wanda(tensor: str, statistics: Statistics, weights: Weights, seed: int) -> Tensor:
    """|w_ij| * ||x_j||_2, with x_j the input feature j over all rows and positions. Compares within one output row.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, equation 1.
    """
    weight = weight_of(weights, tensor)
    norm_F = statistic(statistics, f"input_square/{tensor}").double().sqrt()
    num_out, per_group = weight.shape[:2]
    groups = len(norm_F) // per_group  # a grouped convolution's outputs see the inputs of their group only
    if groups * per_group != len(norm_F) or num_out % groups:
        raise ValueError(
            f"statistic 'input_square/{tensor}' has {len(norm_F)} features, the weight is {list(weight.shape)}. It was scored on another "
            "network: score this one."
        )
    norms = (
        norm_F.reshape(groups, 1, per_group).expand(groups, num_out // groups, per_group).reshape(num_out, per_group)
    )
    return weight.abs() * norms.reshape(num_out, per_group, *[1] * (weight.dim() - 2))


def _per_row(statistics: Statistics, kind: str, tensor: str) -> Tensor:
    return statistic(statistics, f"{kind}/{tensor}").double() / num_rows(statistics)
