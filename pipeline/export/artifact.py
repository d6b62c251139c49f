"""The artifact: a pruned network as safetensors and JSON, rebuilt from its original factory. No pickle.

    OUT/model.safetensors    the weights            OUT/README.md   a model card
    OUT/architecture.json    factory, what changed  OUT/load.py     rebuilds it without this package

A tensor with many zeros is stored without them (export/packing.py) and comes back bit for bit.

What changed is found by comparison with the dense network that the factory builds: the shapes of tensors, and the plain
attributes of modules. So a network that was cut several times is stored like one that was cut once, and a factory that
builds something else is found when the artifact is written, not when it is needed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from pipeline import artifacts
from pipeline.export import card
from pipeline.export.packing import num_bytes, packed
from pipeline.models import standalone
from pipeline.pruning.plan import Plan
from pipeline.pruning.surgery import named_tensors
from pipeline.pruning.verify import CutMismatch, verify

FORMAT = "pruned-network/3"
READABLE = (FORMAT, "pruned-network/2")
"""The former has no tensors that were taken apart."""
WEIGHTS, ARCHITECTURE, README, LOADER = "model.safetensors", "architecture.json", "README.md", "load.py"


class ArtifactError(ValueError):
    """An artifact cannot be written from this model, or what lies there is not a whole one."""


# --- save -------------------------------------------------------------------------------------------------------------


def save(
    model: nn.Module,
    plan: Plan,
    path: str | Path,
    *,
    factory: str = "",
    factory_kwargs: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    input_size: tuple[int, ...] | None = None,
    normalisation: Mapping[str, Any] | None = None,
) -> None:
    """Write `model`, a cut network, as an artifact directory. Whatever is written has been rebuilt and compared before.

    A local directory appears whole or not at all; an older artifact there is replaced. On an object store
    architecture.json is written last, and its hash of the weights tells a mixture of old and new.

    Args:
        path: directory or URI.
        factory: of the *dense* network, a timm name or "package.module:factory"; empty: taken from a timm model.
        factory_kwargs: its arguments, plain JSON. Weights that they would load are not loaded.
        extra: plain JSON for architecture.json and the model card, for example {"top1": 0.78}.
        input_size: of one row, (channels, height, width); empty: the timm model's own.
        normalisation: mean, std, interpolation and crop_pct that the model was used with; empty: the timm model's own.

    Raises:
        ArtifactError: the factory builds another network, or `path` holds something else than an artifact.
    """
    if not factory:
        factory, inferred = timm_factory(model)
        factory_kwargs = {**inferred, **(factory_kwargs or {})}
    kwargs = _offline(factory, dict(factory_kwargs or {}))
    spec = _spec(model, plan, factory, kwargs, dict(extra or {}), input_size or _input_size(model), normalisation or {})
    tensors = _stored_tensors(model, spec)
    stored, spec["sparse"] = packed(tensors)
    weights = dump_tensors(stored)
    spec["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    spec["bytes"] = {"stored": len(weights), "dense": num_bytes(tensors)}
    _check_rebuilt(model, spec, load_tensors(weights))
    target = str(path)
    files = {
        WEIGHTS: weights,
        README: card.render(spec, name=target.rstrip("/").rsplit("/", 1)[-1]).encode(),
        LOADER: Path(standalone.__file__).read_bytes(),
        ARCHITECTURE: (json.dumps(spec, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode(),
    }
    if artifacts.is_uri(target):
        for name, data in files.items():
            artifacts.write_bytes(artifacts.join(target, name), data)
    else:
        _write_directory(Path(artifacts.absolute(target)), files)


def timm_factory(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """Name and arguments with which timm builds the dense parent of `model`, from what the model knows about itself."""
    cfg = _pretrained_cfg(model)
    architecture = cfg.get("architecture")
    if not architecture or not type(model).__module__.startswith("timm."):
        raise ArtifactError(
            f"{type(model).__name__} is no timm model, so the artifact cannot know how to build its dense parent. Pass "
            'factory="package.module:function" (and factory_kwargs={...}), a function that returns the network uncut.'
        )
    kwargs: dict[str, Any] = {"num_classes": getattr(model, "num_classes", cfg.get("num_classes", 1000))}
    usual, (in_chans, *img_size) = tuple(cfg.get("input_size") or (3, 224, 224)), _input_size(model) or (3, 224, 224)
    if in_chans != usual[0]:
        kwargs["in_chans"] = in_chans
    if tuple(img_size) != usual[1:]:
        kwargs["img_size"] = img_size
    return architecture, kwargs


def _offline(factory: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without the arguments that make a factory fetch weights: they come from the artifact."""
    kwargs.pop("pretrained", None)
    if factory.startswith("torchvision."):
        kwargs = {name: value for name, value in kwargs.items() if name not in ("weights", "weights_backbone")}
    try:
        return dict(json.loads(json.dumps(kwargs)))
    except TypeError as error:
        raise ArtifactError(
            f"factory_kwargs {kwargs!r} cannot be written as JSON ({error}). Use numbers, text, lists, or a factory of "
            "your own that takes none."
        ) from error


def _pretrained_cfg(model: nn.Module) -> Mapping[str, Any]:
    """What timm knows about a model's weights; empty for others."""
    cfg = getattr(model, "pretrained_cfg", None)
    return cfg if isinstance(cfg, Mapping) else {}


def _input_size(model: nn.Module) -> tuple[int, ...] | None:
    """(channels, height, width) that a timm model takes; it may have been built for another than its weights' own."""
    cfg = _pretrained_cfg(model)
    if not cfg.get("input_size"):
        return None
    in_chans, *img_size = cfg["input_size"]
    first_conv = dict(model.named_modules()).get(str(cfg.get("first_conv")))
    in_chans = getattr(first_conv, "in_channels", in_chans)
    return (in_chans, *(getattr(getattr(model, "patch_embed", None), "img_size", None) or img_size))


def _spec(
    model: nn.Module,
    plan: Plan,
    factory: str,
    kwargs: dict[str, Any],
    extra: dict[str, Any],
    size: tuple[int, ...] | None,
    normalisation: Mapping[str, Any],
) -> dict[str, Any]:
    dense = _build(factory, kwargs)
    removed = [name for name, module in model.named_modules() if isinstance(module, standalone.Removed)]
    _remove(dense, removed)
    _check_structure(model, dense)
    tensors, dense_tensors = dict(named_tensors(model)), dict(named_tensors(dense))
    persistent = set(model.state_dict())
    changed = {name for name in tensors if name not in persistent and not _same(tensors[name], dense_tensors[name])}
    cfg = {**_pretrained_cfg(model), **normalisation}
    return {
        "format": FORMAT,
        "factory": factory,
        "factory_kwargs": kwargs,
        "shapes": {n: list(t.shape) for n, t in tensors.items() if t.shape != dense_tensors[n].shape},
        "removed": removed,
        "attributes": _changed_attributes(model, dense),
        "functions": {name: edits for name, module in model.named_modules() if (edits := standalone.edits_of(module))},
        "tied": _tied({name: t for name, t in tensors.items() if name in persistent | changed}),
        "buffers": sorted(changed),
        "input_size": list(size) if size else None,
        "normalisation": {key: cfg[key] for key in ("mean", "std", "interpolation", "crop_pct") if key in cfg},
        "plan": {"sha256": plan.sha256(), "criterion": plan.criterion, "scope": plan.scope, "budget": plan.budget},
        "costs": {"dense": asdict(plan.dense), "pruned": asdict(plan.kept)},
        "versions": _versions(),
        "extra": extra,
    }


def _remove(dense: nn.Module, names: list[str]) -> None:
    """Take the residual blocks out of the dense network that are gone; what a factory does not build is told by `_check_structure`."""
    there = dict(dense.named_modules())
    standalone.remove_(dense, [name for name in names if name in there])


def _check_structure(model: nn.Module, dense: nn.Module) -> None:
    """The factory has to build the same modules and tensor names; sizes may differ."""
    ours = {name: type(module).__qualname__ for name, module in model.named_modules()} | _kinds(model)
    theirs = {name: type(module).__qualname__ for name, module in dense.named_modules()} | _kinds(dense)
    wrong = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
    if wrong:
        shown = "; ".join(
            f"{n or 'the model'}: {ours.get(n, 'nothing')}, not {theirs.get(n, 'nothing')}" for n in wrong[:3]
        )
        raise ArtifactError(
            f"the factory builds another network than the one to be saved ({len(wrong)} differences: {shown}). Pass "
            "the factory and factory_kwargs that the dense network was built with."
        )


def _kinds(model: nn.Module) -> dict[str, str]:
    return {name: "parameter" if isinstance(t, nn.Parameter) else "buffer" for name, t in named_tensors(model)}


def _changed_attributes(model: nn.Module, dense: nn.Module) -> dict[str, dict[str, Any]]:
    """Plain attributes (numbers, text, flat tuples of them) by module that are not what the factory makes them."""
    dense_modules = dict(dense.named_modules())
    found = {}
    for name, module in model.named_modules():
        theirs = _plain_attributes(dense_modules[name])
        changed = {k: v for k, v in _plain_attributes(module).items() if k not in theirs or theirs[k] != v}
        if changed:
            found[name] = changed
    return found


_MODULE_INTERNALS = frozenset(vars(nn.Module()))


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    def plain(value: Any) -> bool:
        return value is None or isinstance(value, bool | int | float | str)

    return {
        name: value
        for name, value in vars(module).items()
        if name not in _MODULE_INTERNALS
        and (plain(value) or (isinstance(value, tuple | list) and all(plain(part) for part in value)))
    }


def _tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Further names of one tensor -> its first name."""
    first: dict[int, str] = {}
    return {name: first[id(t)] for name, t in tensors.items() if first.setdefault(id(t), name) != name}


def _stored_tensors(model: nn.Module, spec: Mapping[str, Any]) -> dict[str, Tensor]:
    names = {*model.state_dict(), *spec["buffers"]} - set(spec["tied"])
    return {name: t.detach().cpu().contiguous() for name, t in named_tensors(model) if name in names}


def _check_rebuilt(model: nn.Module, spec: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Rebuild from what will be written and compare: tensors bit for bit, attributes, and one random row's output."""
    rebuilt = _rebuild(spec, tensors, "the artifact to be written")
    theirs = dict(named_tensors(rebuilt))
    wrong = [name for name, tensor in named_tensors(model) if not _same(tensor, theirs[name])]
    wrong += [f"{module}.{name}" for module, names in _changed_attributes(model, rebuilt).items() for name in names]
    if wrong:
        raise ArtifactError(f"{', '.join(wrong[:5])} would not come back as they are; nothing was written.")
    if spec["input_size"]:
        row = torch.rand(1, *spec["input_size"], generator=torch.Generator().manual_seed(0))
        try:
            verify(rebuilt, model, row.to(next(model.parameters()).dtype)).require()
        except CutMismatch as error:
            raise ArtifactError(
                f"the network that factory {spec['factory']} builds has the same weights and computes something else "
                f"({error}). Pass the factory and factory_kwargs that the dense network was built with."
            ) from error
        except Exception as error:
            raise ArtifactError(
                f"the network does not run on one row of {spec['input_size']}: {type(error).__name__}: {error}. Pass "
                "input_size=(channels, height, width) as the network takes it."
            ) from error


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return torch.equal(*bits)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "timm", "safetensors", "gradient-pruning-pipeline"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # run from a source tree
    return found


def _write_directory(target: Path, files: Mapping[str, bytes]) -> None:
    """All files under `target` at once: written beside it, then renamed."""
    if target.exists() and not (target / ARCHITECTURE).exists() and (target.is_file() or any(target.iterdir())):
        raise ArtifactError(
            f"{target} exists and is no artifact: nothing was written. Choose another path or empty it."
        )
    mark = uuid.uuid4().hex[:8]
    new, old = (target.parent / f".{target.name}.{kind}-{mark}" for kind in ("tmp", "old"))
    try:
        for name, data in files.items():
            artifacts.write_bytes(str(new / name), data)
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


# --- load -------------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> nn.Module:
    """The network of an artifact, on the CPU, in eval mode. Its factory loads no weights; nothing is downloaded.

    Raises:
        ArtifactError: a file is missing, cut off, altered or of another version, or the factory builds another network.
    """
    spec = architecture(path)
    weights = _read(path, WEIGHTS)
    found = hashlib.sha256(weights).hexdigest()
    if found != spec["weights_sha256"]:
        raise ArtifactError(
            f"{path}/{WEIGHTS} is cut off or of another artifact: its {len(weights)} bytes have sha256 "
            f"{artifacts.short(found)}, {ARCHITECTURE} names {artifacts.short(spec['weights_sha256'])}. Copy it again."
        )
    try:
        tensors = load_tensors(weights)
    except SafetensorError as error:
        raise ArtifactError(f"{path}/{WEIGHTS} is no safetensors file: {error}. Export the artifact again.") from error
    return _rebuild(spec, tensors, str(path))


def architecture(path: str | Path) -> dict[str, Any]:
    """What architecture.json says: factory, changed shapes and attributes, plan, costs, versions, extra."""
    try:
        spec = json.loads(_read(path, ARCHITECTURE))
    except ValueError as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(
            f"{path}/{ARCHITECTURE} is no JSON ({error}). Copy or export the artifact again."
        ) from error
    if not isinstance(spec, dict) or spec.get("format") not in READABLE:
        found = spec.get("format") if isinstance(spec, dict) else type(spec).__name__
        raise ArtifactError(f"{path}/{ARCHITECTURE} has format {found!r}, this version reads {FORMAT!r}.")
    needed = {"factory", "factory_kwargs", "shapes", "attributes", "functions", "tied", "buffers", "weights_sha256"}
    if not needed <= set(spec):
        raise ArtifactError(f"{path}/{ARCHITECTURE} lacks {', '.join(sorted(needed - set(spec)))}. Export it again.")
    return spec


def _read(path: str | Path, name: str) -> bytes:
    file = artifacts.join(str(path), name)
    if not artifacts.exists(file):
        raise ArtifactError(
            f"{path} is no whole artifact: {name} is missing. An artifact has {WEIGHTS} and {ARCHITECTURE}; "
            "an export that was interrupted leaves nothing, so look for the right path or export again."
        )
    return artifacts.read_bytes(file)


def _build(factory: str, kwargs: dict[str, Any]) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):  # its random weights are thrown away: the caller's sequence goes on
            return standalone.build(factory, kwargs)
    except Exception as error:
        raise ArtifactError(
            f"factory {factory!r} with {kwargs} does not build a network here: {type(error).__name__}: {error}. It is "
            "a timm model name or package.module:function; install its package, or put it on PYTHONPATH."
        ) from error


def _rebuild(spec: dict[str, Any], tensors: dict[str, Tensor], where: str) -> nn.Module:
    dense = _build(spec["factory"], spec["factory_kwargs"])
    try:
        return standalone.rebuild(spec, tensors, dense)
    except (ValueError, AttributeError, KeyError) as error:
        raise ArtifactError(
            f"{where}: {error}. Factory {spec['factory']!r} builds another network than the artifact was made from; "
            f"written with {spec.get('versions')}, read with {_versions()}."
        ) from error
