"""Re-estimation of batch-norm statistics after a cut, as additive sums: exact, order free, spread by the engine.

What a batch norm saw in training was the output of channels that are gone. Averaging the statistics of about 100
batches repairs most of the accuracy that a cut costs, without any training (Li et al., "EagleEye: Fast Sub-net
Evaluation for Efficient Neural Network Pruning", ECCV 2020). The average is torch's own for `momentum=None`: each
micro-batch counts once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.models.sharding import Network
from pipeline.models.task import Place, Task

MEAN, VAR, COUNT = "mean", "var", "count"


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Batch norms with running statistics, by module name; a module that is used under two names once."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


class BatchNormStatistics(Task):
    """Sums over micro-batches of each batch norm's batch mean and variance, for each of `models`.

    Every batch norm normalises with the micro-batch's own statistics, so that each layer sees what it would in
    training; everything else (dropout, drop path) is in eval mode.
    """

    def __init__(self, networks: Mapping[str, Network]) -> None:
        """
        Args:
            networks: by name; copied.
        """
        self.networks = copy.deepcopy(dict(networks))
        self.models: dict[str, nn.Module] = {}
        """The networks where they were placed."""

    def place(self, place: Place) -> None:
        self.models = {name: place(network) for name, network in self.networks.items()}
        for model in self.models.values():
            for layer in batch_norms(model).values():
                layer.train()
                layer.momentum = 1.0  # then the running statistics are exactly those of the last micro-batch

    def idle(self, image_1CHW: Tensor) -> None:
        self(image_1CHW.expand(2, -1, -1, -1), image_1CHW.new_zeros(2))  # one row may have no variance

    @torch.no_grad()
    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
        """Statistics of one micro-batch, on the CPU; labels are not used.

        Returns:
            "<model>/<layer>/mean" and "/var" (unbiased) float64 [channels], "/count" int64 scalar: calls of the layer.
        """
        sums: dict[str, Tensor] = {}
        for name, model in self.models.items():
            sums |= self._statistics(name, model, images_NCHW)
        return sums

    def _statistics(self, name: str, model: nn.Module, images_NCHW: Tensor) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        handles = []
        for path, layer in batch_norms(model).items():
            assert layer.running_mean is not None
            key = f"{name}/{path}"
            zeros = torch.zeros_like(layer.running_mean, dtype=torch.float64)
            sums |= {
                f"{key}/{MEAN}": zeros,
                f"{key}/{VAR}": zeros.clone(),
                f"{key}/{COUNT}": torch.zeros((), dtype=torch.int64),
            }
            handles.append(layer.register_forward_hook(_collect(sums, key)))
            layer.reset_running_stats()  # 0 * NaN of a broken old statistic would stay NaN
        try:
            model(images_NCHW)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                f"{len(images_NCHW)} image(s) leave one value per channel in a batch norm of model '{name}': no "
                "variance. Choose calibrate.batch_size so that no micro-batch is left with one row."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        return {key: value.cpu() for key, value in sums.items()}


def _collect(sums: dict[str, Tensor], key: str) -> Any:
    """A forward hook that adds one call's statistics to `sums`; a layer used twice in a forward counts twice."""

    def hook(layer: _BatchNorm, inputs: Any, output: Any) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        sums[f"{key}/{MEAN}"] += layer.running_mean.double()
        sums[f"{key}/{VAR}"] += layer.running_var.double()
        sums[f"{key}/{COUNT}"] += 1

    return hook


def apply_statistics(model: nn.Module, sums: Mapping[str, Tensor], name: str) -> nn.Module:
    """A new model whose running means and variances are the averages of `sums`.

    Args:
        model: the one that BatchNormStatistics knew as `name`; not changed. The new one shares its parameters.
        sums: added up over at least one micro-batch. A layer that no forward called keeps what it has.
    """
    calibrated = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for path, layer in batch_norms(calibrated).items():
        key = f"{name}/{path}"
        if f"{key}/{COUNT}" not in sums:
            known = sorted({k.split("/")[0] for k in sums})
            raise ValueError(
                f"no statistics of batch norm '{path}' of model '{name}'. There are some of: {', '.join(known)}."
            )
        count = int(sums[f"{key}/{COUNT}"])
        if count == 0:
            continue
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(sums[f"{key}/{MEAN}"] / count)
        layer.running_var.copy_(sums[f"{key}/{VAR}"] / count)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(count)
    return calibrated
