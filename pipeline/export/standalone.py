"""Rebuilds the pruned network beside this file: `from load import load; load()`. Needs torch, timm, safetensors."""

import importlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn


def build(factory: str, kwargs: dict[str, Any]) -> nn.Module:
    module, _, name = factory.rpartition(":")
    library = importlib.import_module(module or "timm")
    return getattr(library, name)(**kwargs) if module else library.create_model(name, pretrained=False, **kwargs)


def rebuild(spec: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module) -> nn.Module:
    dense = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    sources, names = {name: name for name in tensors} | spec["tied"], [*model.state_dict(), *spec["buffers"]]
    shapes = {name: list(tensors[source].shape) for name, source in sources.items()}
    wanted = {name: spec["shapes"].get(name, list(dense[name].shape)) for name in names}
    if shapes != wanted:
        wrong = sorted(name for name in shapes | wanted if shapes.get(name) != wanted.get(name))
        raise ValueError(f"weights and architecture do not fit in {', '.join(wrong[:5])} ({len(wrong)} tensors)")
    new = {name: nn.Parameter(tensor, tensor.is_floating_point()) for name, tensor in tensors.items()}
    for name, source in sources.items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, (new if isinstance(dense[name], nn.Parameter) else tensors)[source])
    for module, values in ((model.get_submodule(path), values) for path, values in spec["attributes"].items()):
        for name, value in values.items():
            setattr(module, name, tuple(value) if isinstance(getattr(module, name, None), tuple) else value)
    return model.eval()


def load(directory: str | Path = Path(__file__).parent) -> nn.Module:
    spec = json.loads(Path(directory, "architecture.json").read_text(encoding="utf-8"))
    return rebuild(
        spec, load_file(Path(directory, "model.safetensors")), build(spec["factory"], spec["factory_kwargs"])
    )
