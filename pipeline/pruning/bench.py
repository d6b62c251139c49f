"""The bench: a copy of the network with random weights and inputs, on which one cut is tried at a time."""

from __future__ import annotations

import copy
import functools
import math
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.models.calls import each_module
from pipeline.models.standalone import original_class
from pipeline.models.trace import Deadline
from pipeline.models.trace.sizes import owner_of
from pipeline.pruning.plan import Plan
from pipeline.pruning.reference import Masked, mask
from pipeline.pruning.surgery import cut
from pipeline.pruning.verify import compare, output_tensors

MANY_MACS = 10**9
"""From here on trials run two rows instead of three, and always with the same weights."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong in a trial, and where."""

    error: str
    where: str
    """ "module path (file.py:line)"; empty if it is not known."""
    frames: tuple[StackFrame, ...] = ()
    """Where the network stopped, innermost first."""


@dataclass(frozen=True, slots=True)
class StackFrame:
    """A function of the network that was running, and the lines of the call that stopped, from the function's first."""

    owner: type | None
    """Class of the module whose method, or helper of one, it is."""
    function: str
    first_line: int
    last_line: int


@dataclass(frozen=True, slots=True)
class _Setting:
    dtype: torch.dtype
    tolerance: float
    num_rows: int | None
    """None: as many rows as the example has."""


_SETTINGS = (
    _Setting(torch.float64, 1e-7, 3),
    _Setting(torch.float64, 1e-7, None),
    _Setting(torch.float32, 1e-3, 3),
    _Setting(torch.float32, 1e-3, None),
)
"""The first in which the dense network runs is used: some networks insist on float32 inside, or on their batch size."""


class Bench:
    """A copy of the network with random weights, and random inputs: where trial cuts are run."""

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Tensor, ...],
        seed: int,
        *,
        macs: int = 0,
        deadline: Deadline | None = None,
    ) -> None:
        self.deadline, self.seed, self.many_macs = deadline, seed, macs > MANY_MACS
        self.outputs: list[Tensor] = []
        """Of the dense network."""
        self._halves: list[tuple[tuple[Tensor, ...], list[Tensor]]] | None = None
        self.training = False
        """Attempts must also run in training mode."""
        problems: list[str] = []
        for setting in _SETTINGS if not self.many_macs else [replace(s, num_rows=s.num_rows and 2) for s in _SETTINGS]:
            self.tolerance = setting.tolerance
            self.inputs = tuple(_random_input(x, setting, torch.Generator().manual_seed(seed)) for x in inputs)
            self.model = copy.deepcopy(model).to(setting.dtype).eval()
            problem = self._draw(0)
            if not problem:
                return
            problems.append(f"{setting.dtype}, {setting.num_rows or 'own'} rows: {problem}")
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
        raise ValueError(
            f"trial cuts cannot run the dense network on random inputs of shape {shapes}: {'; '.join(problems)}. "
            "Pass example_inputs that the network accepts; trace without trials with pipeline.models.trace.propagate."
        )

    def draw(self, trial: int) -> None:
        """Other random weights, where that costs little: in a narrow network a ReLU that never opens may hide a mistake."""
        if not self.many_macs and self._draw(trial):
            self._draw(0)

    def _draw(self, trial: int) -> str:
        """Draw weights and run the dense network; what is wrong with its outputs, or nothing."""
        randomise_(self.model, torch.Generator().manual_seed(self.seed + 1_000_003 * trial))
        self._halves = None
        try:
            with _calibrating(self.model):
                outputs = self.outputs = self._run(self.model)
        except Exception as error:
            return _first_line(error)
        finite = outputs and all(bool(t.isfinite().all()) for t in outputs)
        return "" if finite and any(bool(t.any()) for t in outputs) else "outputs are not finite, or all zero"

    def attempt(self, plan: Plan, *, explain: bool = False) -> Failure | None:
        """Cut, run, compare with the masked network. None if they agree."""
        if self.deadline:
            self.deadline.check("trying cuts")
        try:
            small = cut(self.model, plan)
        except ValueError as error:
            return Failure(_first_line(error), "")
        try:
            ours = self._run(small)
        except Exception as error:
            return _stopped(small, error, "the cut network stops with")
        masked = mask(self.model, plan)
        try:
            difference = compare(ours, self._run(masked), rows=1)
        except Exception as error:
            return Failure(f"the masked network stops with {_first_line(error)}", "")
        if difference.max_rel <= self.tolerance:
            failure = self._training_failure(small) if self.training else None
            return failure if failure and self._trains else None
        where = self._first_difference(small, masked) if explain else ""
        return Failure(
            f"the cut network differs from the masked one by {difference.max_rel:.2g} of the largest output", where
        )

    def keeps_dense(self, plan: Plan) -> bool:
        """Does a plan that removes nothing leave the outputs as they are, also those for images of another size?"""
        if self.deadline:
            self.deadline.check("trying what the code states about sizes")
        if self._halves is None:
            self._halves = self._other_sizes()
        try:
            small = cut(self.model, plan)
            return all(
                compare(self._run(small, inputs), outputs, rows=1).max_rel <= self.tolerance
                for inputs, outputs in ((self.inputs, self.outputs), *self._halves)
            )
        except Exception:  # a method that cannot be copied, or code that stops
            return False

    def _other_sizes(self) -> list[tuple[tuple[Tensor, ...], list[Tensor]]]:
        """Inputs of half the height, or length, and what the dense network makes of them, if it takes them."""
        halves = tuple(
            x.narrow(-2, 0, x.shape[-2] // 2) if x.is_floating_point() and x.dim() > 2 and x.shape[-2] > 1 else x
            for x in self.inputs
        )
        try:
            return [(halves, self._run(self.model, halves))]
        except Exception:
            return []

    @functools.cached_property
    def _trains(self) -> bool:
        """Does the dense network run in training mode?"""
        return self._training_failure(copy.deepcopy(self.model)) is None

    def _training_failure(self, model: nn.Module) -> Failure | None:
        """What stops the network in training mode, in which it may run other code; it is worth nothing afterwards."""
        try:
            self._run(model.train())
        except Exception as error:
            return _stopped(model, error, "in training mode the cut network stops with")
        return None

    @torch.no_grad()
    def _run(self, model: nn.Module, inputs: tuple[Tensor, ...] | None = None) -> list[Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return [tensor.clone() for tensor in output_tensors(model(*(self.inputs if inputs is None else inputs)))]

    def _first_difference(self, small: nn.Module, masked: nn.Module) -> str:
        """The first module, in running order, whose output has the same shape in both networks but other values."""
        reference = dict(self._outputs(masked))
        for call, ours in self._outputs(small):
            theirs = reference.get(call)
            if theirs is not None and theirs.shape == ours.shape:
                scale = max(float(theirs.abs().max()), torch.finfo(torch.float32).tiny) if theirs.numel() else 1.0
                if not float((ours - theirs).abs().amax()) <= self.tolerance * scale:
                    return call[0]
        return ""

    def _outputs(self, model: nn.Module) -> list[tuple[tuple[str, int], Tensor]]:
        """Floating-point outputs of all modules, by (module, how often it was called before)."""
        found: list[tuple[tuple[str, int], Tensor]] = []
        calls: dict[str, int] = {}

        def keep(name: str, output: object) -> None:
            calls[name] = calls.get(name, -1) + 1
            if name and isinstance(output, Tensor) and output.is_floating_point():
                found.append(((name, calls[name]), output.clone()))

        with each_module(model.model if isinstance(model, Masked) else model, lambda *_: None, keep):
            self._run(model)
        return found


# --- random weights ---------------------------------------------------------------------------------------------------


def _random_input(example: Tensor, setting: _Setting, generator: torch.Generator) -> Tensor:
    """Other rows of the example's kind; whole numbers (tokens) are drawn from those that the example has."""
    shape = (setting.num_rows or example.shape[0], *example.shape[1:])
    if example.is_floating_point():
        return torch.randn(shape, generator=generator, dtype=setting.dtype).to(example.device)
    chosen = torch.randint(example.numel(), shape, generator=generator)
    return example.reshape(-1)[chosen.to(example.device)]


@torch.no_grad()
def randomise_(model: nn.Module, generator: torch.Generator) -> None:
    """Random parameters and BatchNorm statistics of ordinary size, none of them zero."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            low, high = _range(name, parameter)
            values = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(values * (high - low) + low)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.copy_(torch.rand(module.running_mean.shape, generator=generator) - 0.5)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)


def _range(name: str, parameter: Tensor) -> tuple[float, float]:
    if parameter.dim() >= 2:
        bound = math.sqrt(6 / max(parameter[0].numel(), 1))  # uniform of variance 2 / fan-in: relu keeps the scale
        return -bound, bound
    return (-0.5, 0.5) if "bias" in name.rpartition(".")[2] else (0.5, 1.5)


@contextmanager
def _calibrating(model: nn.Module) -> Iterator[None]:
    """Inside, each BatchNorm shifts its random statistics to those of the input that it sees.

    Otherwise a hundred residual blocks add up until every sigmoid behind them is 0 or 1 and hides what goes in.
    """

    def fit(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x, mean, var = inputs[0], module.running_mean, module.running_var
        assert isinstance(mean, Tensor)
        assert isinstance(var, Tensor)
        dims = [dim for dim in range(x.dim()) if dim != 1]
        spread = x.var(dim=dims, unbiased=False) + 1e-3
        mean.copy_(x.mean(dim=dims) + mean * spread.sqrt())
        var.mul_(spread)

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    handles = [module.register_forward_pre_hook(fit) for module in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- where something happened -----------------------------------------------------------------------------------------


def _stopped(model: nn.Module, error: Exception, text: str) -> Failure:
    return Failure(f"{text} {_first_line(error)}", _place(model, error), tuple(_stack_frames(error)))


def _stack_frames(error: Exception) -> Iterator[StackFrame]:
    """Functions of modules, and helpers that they call, innermost first."""
    found: list[StackFrame] = []
    owner: type | None = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        code, module = frame.f_code, owner_of(frame)
        owner = owner if module is None else original_class(module)
        start, end, *_ = list(code.co_positions())[frame.f_lasti // 2]
        first = code.co_firstlineno
        found.append(StackFrame(owner, code.co_name, (start or line) - first, (end or line) - first))
    return reversed(found)


def _place(model: nn.Module, error: Exception) -> str:
    """ "layer1.0 (resnet.py:244)": the innermost module, and the last line outside torch itself."""
    names = {id(module): name for name, module in model.named_modules()}
    owners = [id(owner_of(frame)) for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = [names[owner] for owner in owners if owner in names][-1:]
    library = f"{Path(torch.__file__).parent}{os.sep}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(library)]
    frames = [f for f in frames if f.filename != __file__]
    line = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{''.join(module)}{line}".strip()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else '(no message)'}"
