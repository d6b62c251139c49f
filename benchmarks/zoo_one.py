"""One architecture of the zoo, in the process that is measured; `benchmarks.zoo` starts it and watches it.

ours            trace, cut at random ratios, forward, backward, cut = masked, save, load without this package, the same outputs again
torch-pruning   its graph, its pruner at random ratios, forward, backward, pruned = dense with the same entries zeroed

Every parameter gets a random value before the cut, since scales that are zero at the beginning hide what lies behind them. FILE says which
step is running, and in the end how it went: `python -c "from benchmarks.zoo_one import main; main()" ours resnet10t --record FILE`.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import pipeline
from benchmarks.measuring import peak_memory
from benchmarks.zoo_list import Architecture, architectures
from pipeline.models.graph import Frozen, Graph
from pipeline.pruning.bench import randomise_
from pipeline.pruning.plan import planned
from pipeline.pruning.trials import random_subsets
from pipeline.pruning.verify import compare, output_tensors, verify

NUM_ROWS = 2
MAX_REL_FLOAT32, MAX_REL_FLOAT64 = 1e-3, 1e-6
"""Largest difference of an output element, relative to the largest output. Where float32 exceeds its own, float64 decides."""
MAX_REL_LOADED = 1e-5


class Refused(Exception):
    """Nothing can be cut, or the tracer says that it cannot say."""


class Mismatch(Exception):
    """The smaller network computes something else than it should."""


# --- the record -------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What is known so far about one architecture, in a file that is whole at any time."""

    path: Path
    figures: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.add(step=name)
        yield

    def add(self, **figures: Any) -> None:
        self.figures.update(figures)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.figures))
        os.replace(new, self.path)


def run(work: Callable[[Architecture, Record, float], None], name: str, record: Record, timeout_s: float) -> None:
    """`work`, and its end in the words of the benchmark."""
    try:
        work(architectures()[name], record, timeout_s)
    except Refused as error:
        record.add(status="refused", reason=first_line(error))
    except Mismatch as error:
        record.add(status="mismatch", reason=first_line(error))
    except Exception as error:
        record.add(status="error", reason=f"{record.figures['step']}: {type(error).__name__}: {first_line(error)}")
    else:
        record.add(status="cut", reason="")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["(no message)"])[0][:300]


# --- the network ------------------------------------------------------------------------------------------------------


def build(architecture: Architecture) -> nn.Module:
    """The dense network, in eval mode, with the weights that its factory draws."""
    torch.manual_seed(0)
    module, _, name = architecture.name.rpartition(":")
    library = importlib.import_module(module or "timm")
    make = getattr(library, name) if module else lambda **kwargs: library.create_model(name, **kwargs)
    network: nn.Module = make(**architecture.kwargs)
    return network.eval()


def dense(architecture: Architecture, record: Record) -> tuple[nn.Module, Tensor]:
    """The dense network and images for it, which it has seen once."""
    with record.step("build"):
        model = build(architecture)
        size = architecture.size or model.pretrained_cfg["input_size"][-1]
        images = torch.randn(NUM_ROWS, 3, size, size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            model(images)
        record.add(size=size, num_params=sum(parameter.numel() for parameter in model.parameters()))
    return model, images


@torch.no_grad()
def randomise(model: nn.Module, images: Tensor, record: Record) -> None:
    """Random values in place: of all parameters, or where that overflows, of the constant ones (scales, biases) only."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for which in ("all", "constant"):
        generator = torch.Generator().manual_seed(1)
        if which == "all":
            randomise_(model, generator)
        else:
            model.load_state_dict(before)
            _randomise_constants_(model, generator)
        outputs = _calibrated_(model, images)
        if all(bool(t.isfinite().all()) for t in outputs) and any(bool((t[:1] != t[1:]).any()) for t in outputs):
            record.add(randomised=which)
            return
    raise RuntimeError("with random weights the dense network's outputs are not finite, or the same for all images")


def _randomise_constants_(model: nn.Module, generator: torch.Generator) -> None:
    for parameter in model.parameters():
        if parameter.numel() and bool((parameter == parameter.reshape(-1)[0]).all()):
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.5 + 0.1)


def _calibrated_(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Outputs for `images`, before which each BatchNorm has taken statistics near those of the input that it sees."""

    def fit(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        mean, var = module.running_mean, module.running_var
        x_CN = inputs[0].transpose(0, 1).flatten(1)
        spread = x_CN.var(dim=1, unbiased=False) + 1e-3
        mean.copy_(x_CN.mean(dim=1) + mean * spread.sqrt())  # type: ignore[operator, union-attr]
        var.copy_(spread * (0.5 + torch.rand(spread.shape, generator=generator)))  # type: ignore[operator, union-attr]

    generator = torch.Generator().manual_seed(2)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_var is not None]
    handles = [module.register_forward_pre_hook(fit) for module in norms]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return list(output_tensors(model(images)))


# --- checks of a smaller network --------------------------------------------------------------------------------------


def check_forward(small: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        outputs = list(output_tensors(small(images)))
    if not all(bool(tensor.isfinite().all()) for tensor in outputs):
        raise Mismatch("outputs are not finite")
    return outputs


def check_backward(dense: nn.Module, small: nn.Module, images: Tensor) -> None:
    """Each parameter with a finite gradient in the dense network has one in the smaller network; float64 decides."""
    if lacking := _finite_gradients(dense, images) - _finite_gradients(small, images):
        wide = [copy.deepcopy(model).double() for model in (dense, small)]
        lacking &= _finite_gradients(wide[0], images.double()) - _finite_gradients(wide[1], images.double())
    if lacking:
        raise RuntimeError(f"{len(lacking)} parameters have no finite gradient, among them {min(lacking)}")


def _finite_gradients(model: nn.Module, images: Tensor) -> set[str]:
    """Names of the parameters with a finite gradient of the cross entropy, in eval mode: dropout hides nothing."""
    model.zero_grad()
    loss = sum(
        F.cross_entropy(t.flatten(1), torch.arange(len(t)))
        for t in output_tensors(model(images))
        if t.is_floating_point()
    )
    loss.backward()  # type: ignore[union-attr]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return {name for name, gradient in gradients.items() if bool(gradient.isfinite().all())}


def check_equal(small: nn.Module, reference: nn.Module, images: Tensor, record: Record) -> None:
    """Both compute the same: within float32 rounding, else within float64's. The reference is converted in place."""
    difference = verify(small, reference, images).max_rel
    record.add(max_rel=difference if math.isfinite(difference) else str(difference))
    if not difference <= MAX_REL_FLOAT32:
        wide = copy.deepcopy(small).double()
        difference = verify(wide, reference.double(), images.double()).max_rel
        record.add(max_rel_float64=difference if math.isfinite(difference) else str(difference))
        if not difference <= MAX_REL_FLOAT64:
            raise Mismatch(f"outputs differ by {difference:.2g} of the largest in float64")


class Coverage:
    """How many elements of the parameters have an index, along any dimension, that belongs to a group."""

    def __init__(self, shapes: Mapping[str, Iterable[int]]) -> None:
        self._outside = {name: [torch.ones(size, dtype=torch.bool) for size in shape] for name, shape in shapes.items()}

    def add(self, name: str, dim: int, entries: Tensor) -> None:
        if name in self._outside:
            self._outside[name][dim][entries.reshape(-1)] = False

    def share(self) -> float:
        total = sum(math.prod(len(dim) for dim in dims) for dims in self._outside.values())
        outside = sum(math.prod(int(dim.sum()) for dim in dims) for dims in self._outside.values())
        return 1 - outside / total


# --- ours -------------------------------------------------------------------------------------------------------------


def ours(architecture: Architecture, record: Record, timeout_s: float) -> None:
    """Every step of `pipeline` that a user takes from the network to the artifact."""
    model, images = dense(architecture, record)
    with record.step("trace"):
        graph = _trace(model, images, record, timeout_s)
    record.add(**_figures(graph))
    cuttable = [group for group in graph.groups if group.size > 1]
    if not cuttable:
        reasons = Counter(f"{frozen.operation}: {frozen.reason}" for frozen in graph.frozen).most_common(1)
        raise Refused(reasons[0][0] if reasons else "the graph has no group")
    with record.step("randomise"):
        randomise(model, images, record)
    with record.step("cut"):
        plan = planned(graph, random_subsets(graph, seed=1, trial=7))
        small = pipeline.cut(model, plan)
        record.add(params_kept=sum(p.numel() for p in small.parameters()) / record.figures["num_params"])
    with record.step("forward"):
        outputs = check_forward(small, images)
    with record.step("backward"):
        check_backward(model, small, images)
    with record.step("equality"):
        check_equal(small, pipeline.mask(model, plan), images, record)
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder, "artifact")
        with record.step("save"):
            size = (3, record.figures["size"], record.figures["size"])
            options = {"factory": architecture.name, "factory_kwargs": architecture.kwargs, "input_size": size}
            pipeline.save(small, plan, artifact, **options)
        with record.step("load"):
            _check_loaded(artifact, images, outputs, record)


def _trace(model: nn.Module, images: Tensor, record: Record, timeout_s: float) -> Graph:
    options: dict[str, Any] = {"seed": 0}
    if "time_limit_s" in inspect.signature(pipeline.trace).parameters:
        options["time_limit_s"] = timeout_s
    started = time.perf_counter()
    try:
        with peak_memory() as memory:
            graph = pipeline.trace(model, images, **options)
    except ValueError as error:
        raise Refused(f"{type(error).__name__}: {first_line(error)}") from error
    finally:
        record.add(trace_s=time.perf_counter() - started)
    record.add(trace_extra_mb=memory["extra_mb"])
    return graph


def _figures(graph: Graph) -> dict[str, Any]:
    """Groups, what is frozen, and the share of the parameters inside of groups that can be cut."""
    coverage = Coverage({name: graph.shapes[name] for name in graph.parameters})
    for group in graph.groups:
        for member in group.members if group.size > 1 else ():
            coverage.add(member.tensor, member.dim, member.index_CK)
    return {
        "num_groups": sum(group.size > 1 for group in graph.groups),
        "share": coverage.share(),
        "frozen_reasons": Counter(map(reason_class, graph.frozen)),
        "frozen": [asdict(frozen) for frozen in graph.frozen],
    }


def reason_class(frozen: Frozen) -> str:
    """Operation and reason without the numbers, so that equal reasons count together."""
    return re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", f"{frozen.operation}: {frozen.reason}")


LOAD = """
import sys
sys.modules["pipeline"] = sys.modules["benchmarks"] = None  # importing them is an error
sys.path.insert(0, sys.argv[1])
import torch
from load import load
torch.set_num_threads(1)
with torch.no_grad():
    torch.save(load()(torch.load(sys.argv[2])), sys.argv[3])
"""


def _check_loaded(artifact: Path, images: Tensor, outputs: list[Tensor], record: Record) -> None:
    """A process that has nothing of this package but the artifact gives the same outputs."""
    inputs, results = artifact.with_name("images.pt"), artifact.with_name("outputs.pt")
    torch.save(images, inputs)
    command = [sys.executable, "-I", "-c", LOAD, str(artifact), str(inputs), str(results)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=artifact.parent)
    if ended.returncode:
        raise RuntimeError((ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1])
    difference = compare(list(output_tensors(torch.load(results))), outputs, rows=len(images)).max_rel
    record.add(max_rel_loaded=difference if math.isfinite(difference) else str(difference))
    if not difference <= MAX_REL_LOADED:
        raise Mismatch(f"the loaded network's outputs differ by {difference:.2g} of the largest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["ours", "torch-pruning"])
    parser.add_argument("name", help="a name of benchmarks.zoo_list")
    parser.add_argument("--record", type=Path, required=True, help="JSON file, rewritten at each step")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that the trace may take")
    options = parser.parse_args()
    torch.set_num_threads(1)
    work: Callable[[Architecture, Record, float], None] = ours
    if options.side == "torch-pruning":
        from benchmarks.zoo_peer import peer as work  # the import is no part of our memory
    run(work, options.name, Record(options.record), options.timeout)
