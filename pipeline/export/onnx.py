"""The network for other runtimes: an ONNX file and a torch.export program, each compared with the network before it is kept.

Both hold the weights and the computation, so neither needs the factory that the artifact is rebuilt with. The number of rows stays open
where the network allows it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pipeline import artifacts
from pipeline.pruning.verify import Difference, compare, output_tensors
from pipeline.training.latency import in_turns

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
"""Largest difference of an output, relative to the largest output: as for the cut itself, and about 100 times what another order of float32
additions and folded batch norms were seen to make."""
CHECKED_ROWS = 3
"""Neither the one row of a service nor the two of the export: an axis that only seems open is found."""

Example = Tensor | tuple[Tensor, ...]


class ExportError(ValueError):
    """The network cannot be written in this form, or what lies there cannot be read."""


class ExportMismatch(ExportError):
    """What was written computes something else than the network."""


class ExportUnavailable(ExportError):
    """A package of the extra `export` is not installed."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What is known about a written file."""

    difference: Difference
    """Of its outputs from the network's, on random rows."""
    open_batch: bool
    """Whether it takes any number of rows; otherwise it takes those of the example."""


def require_packages() -> None:
    """Raises ExportUnavailable unless ONNX files can be written and run here."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ExportUnavailable(
            f"ONNX needs {', '.join(missing)}, not installed here. Install with: "
            'pip install "gradient-pruning-pipeline[export]"'
        )


# --- write --------------------------------------------------------------------------------------------------------------


def to_onnx(model: nn.Module, example: Example, path: str | Path) -> Exported:
    """Write `model` in eval mode as one ONNX file; `model` itself stays as it is.

    Args:
        example: float [N, ...], N >= 1; a tuple for networks of several inputs.
        path: file or URI. It appears whole and after the comparison, or not at all.

    Raises:
        ExportMismatch: ONNX Runtime's outputs are not the network's.
        ExportError: an operation has no ONNX form, or the file would exceed ONNX's 2 GiB.
        ExportUnavailable: packages are missing.
    """
    require_packages()
    network, inputs = _frozen(model), _as_tuple(example)
    program, open_batch = _program(network, inputs)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "model.onnx")
        try:
            torch.onnx.export(program, f=file, dynamo=True, external_data=False, verbose=False)
            data = _without_traces(file.read_bytes())
        except Exception as error:
            raise ExportError(
                f"{path}: {_name(model)} has no ONNX form: {first_line(error)}. Use the artifact, or its torch.export program."
            ) from error
    difference = _compare_onnx(data, network, _rows(inputs, open_batch), str(path))
    artifacts.write_bytes(str(path), data)
    return Exported(difference, open_batch)


def _without_traces(data: bytes) -> bytes:
    """Without the exporter's notes on each node: stack traces of this machine that no runtime reads."""
    import onnx

    model = onnx.load_from_string(data)
    for node in model.graph.node:
        del node.metadata_props[:]
    return bytes(model.SerializeToString())


def to_program(model: nn.Module, example: Example, path: str | Path) -> Exported:
    """The same as a torch.export program (.pt2), which torch alone reads: `torch.export.load(path).module()`."""
    network, inputs = _frozen(model), _as_tuple(example)
    program, open_batch = _program(network, inputs)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    difference = _compare_program(buffer.getvalue(), network, _rows(inputs, open_batch), str(path))
    artifacts.write_bytes(str(path), buffer.getvalue())
    return Exported(difference, open_batch)


def _program(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[ExportedProgram, bool]:
    """The network's graph, with an open number of rows where it has one, and whether it has."""
    with torch.no_grad():
        network(*inputs)  # fills what a network keeps from its first forward, such as the position biases of LeViT
    # Two rows: a single one would be taken for a constant of the network.
    rows = tuple(tensor[:1].expand(2, *tensor.shape[1:]).contiguous() for tensor in inputs)
    batch = Dim("batch")
    with contextlib.suppress(Exception):  # a number of rows that is written into a shape; other faults come again below
        return torch.export.export(network, rows, dynamic_shapes=({0: batch},) * len(rows)), True
    try:
        return torch.export.export(network, inputs), False
    except Exception as error:
        raise ExportError(f"torch.export cannot follow {_name(network)}: {first_line(error)}") from error


def _frozen(model: nn.Module) -> nn.Module:
    """A copy as it is exported: in eval mode, on the CPU."""
    return copy.deepcopy(model).cpu().eval()


def _as_tuple(example: Example) -> tuple[Tensor, ...]:
    inputs = tuple(tensor.cpu() for tensor in (example if isinstance(example, tuple) else (example,)))
    if not inputs or any(tensor.dim() == 0 or len(tensor) == 0 for tensor in inputs):
        raise ValueError("the example needs at least one row: it tells what the network takes.")
    return inputs


# --- compare ------------------------------------------------------------------------------------------------------------


def check_onnx(path: str | Path, model: nn.Module, example: Example) -> Difference:
    """How far ONNX Runtime's outputs of a file are from those of `model`, on the example's rows.

    Raises:
        ExportMismatch: farther than rounding.
        ExportError: the file cannot be read, or does not take such rows.
    """
    require_packages()
    return _compare_onnx(artifacts.read_bytes(str(path)), _frozen(model), _as_tuple(example), str(path))


def check_program(path: str | Path, model: nn.Module, example: Example) -> Difference:
    """The same of a torch.export program."""
    return _compare_program(artifacts.read_bytes(str(path)), _frozen(model), _as_tuple(example), str(path))


def _compare_onnx(data: bytes, network: nn.Module, rows: tuple[Tensor, ...], path: str) -> Difference:
    try:
        session = _session(data)
        named = {one.name: tensor.numpy() for one, tensor in zip(session.get_inputs(), rows, strict=True)}
        found = [torch.from_numpy(output) for output in session.run(None, named)]
    except Exception as error:
        raise ExportError(f"{path}: ONNX Runtime cannot run it: {first_line(error)}. Export it again.") from error
    return _require_equal(found, network, rows, path)


@torch.no_grad()
def _compare_program(data: bytes, network: nn.Module, rows: tuple[Tensor, ...], path: str) -> Difference:
    try:
        found = list(output_tensors(torch.export.load(io.BytesIO(data)).module()(*rows)))
    except Exception as error:
        raise ExportError(f"{path}: torch.export cannot run it: {first_line(error)}. Export it again.") from error
    return _require_equal(found, network, rows, path)


@torch.no_grad()
def _require_equal(found: list[Tensor], network: nn.Module, rows: tuple[Tensor, ...], path: str) -> Difference:
    wanted = list(output_tensors(network(*rows)))
    shapes, wanted_shapes = ([tuple(tensor.shape) for tensor in tensors] for tensors in (found, wanted))
    if shapes != wanted_shapes:
        raise ExportMismatch(f"{path}: outputs have shapes {shapes}, those of {_name(network)} {wanted_shapes}.")
    difference = compare(found, wanted, rows=len(rows[0]))
    if not difference.max_rel <= TOLERANCE:  # written so that NaN fails too
        raise ExportMismatch(
            f"{path}: outputs differ from those of {_name(network)} on {difference.rows} rows: max_abs "
            f"{difference.max_abs:.3g}, max_rel {difference.max_rel:.3g}, allowed {TOLERANCE:.3g}. An export "
            "leaves no file then; do not use one that lies there. Look for code that asks whether it is being exported."
        )
    return difference


def _rows(inputs: tuple[Tensor, ...], open_batch: bool) -> tuple[Tensor, ...]:
    """Random rows like the example's; whole numbers are indices, so they stay those of its first row."""
    generator = torch.Generator().manual_seed(0)
    num_rows = CHECKED_ROWS if open_batch else len(inputs[0])

    def like(tensor: Tensor) -> Tensor:
        shape = (num_rows, *tensor.shape[1:])
        if tensor.is_floating_point():
            return torch.randn(shape, generator=generator).to(tensor.dtype)
        return tensor[:1].expand(shape).contiguous()

    return tuple(like(tensor) for tensor in inputs)


# --- run ----------------------------------------------------------------------------------------------------------------


class OnnxNetwork(nn.Module):
    """An ONNX file as a network: what evaluates networks evaluates it too. Float32 [N, ...] -> its first output, on the rows' device.

    It holds the file's bytes and computes on the CPU, in a session that each process opens at its first rows, with the threads that torch
    has there: so it can be copied and sent to workers.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data = data
        self._opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": None}

    @property
    def session(self) -> Any:
        if self._opened is None:
            self._opened = _session(self.data)
        return self._opened

    def feeds(self, rows: Tensor) -> Iterator[dict[str, Any]]:
        """The rows as the session takes them: all at once, or as many at a time as the file has."""
        name, on_cpu = self.session.get_inputs()[0].name, rows.detach().float().cpu().contiguous()
        for part in on_cpu.split(_rows_at_once(self.session) or max(1, len(rows))):
            yield {name: part.numpy()}

    def forward(self, rows: Tensor) -> Tensor:
        outputs = [torch.from_numpy(self.session.run(None, feed)[0]) for feed in self.feeds(rows)]
        return torch.cat(outputs).to(rows.device)


def _rows_at_once(session: Any) -> int | None:
    """Rows that a file takes; None: any number, which has a name instead of a value."""
    accepted = session.get_inputs()[0].shape[0]
    return accepted if isinstance(accepted, int) else None


# --- time ---------------------------------------------------------------------------------------------------------------


def onnx_latency(
    files: Mapping[str, str | Path],
    input_shape: Sequence[int],
    *,
    batch_sizes: Sequence[int] = (1, 32),
    runs: int = 30,
) -> dict[str, Any]:
    """Median time of ONNX Runtime on the CPU, float32, with as many threads as torch has now; see `measure_latency`.

    Args:
        files: by name.
        input_shape: of one row, for example (3, 224, 224).
        batch_sizes: rows in one forward. A file of another, fixed number of rows is left out there.
        runs: timed forwards of each file and batch size; the files take turns.

    Returns:
        {"device": "cpu", "runtime": version, "threads": count, "runs": runs,
         "batch": {"1": {"<file>": {"median_ms", "min_ms", "max_ms", "rows_per_s"}}}}: plain values for JSON.
    """
    require_packages()
    import onnxruntime

    sessions = {name: _session(artifacts.read_bytes(str(path))) for name, path in files.items()}
    generator = torch.Generator().manual_seed(0)
    by_batch: dict[str, Any] = {}
    for size in batch_sizes:
        images = torch.randn(size, *input_shape, generator=generator).numpy()
        forwards = {
            name: partial(_forward_ms, session, images) for name, session in sessions.items() if _takes(session, size)
        }
        by_batch[str(size)] = in_turns(forwards, size, runs)
    return {
        "device": "cpu",
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "threads": torch.get_num_threads(),
        "runs": runs,
        "batch": by_batch,
    }


def _takes(session: Any, num_rows: int) -> bool:
    return _rows_at_once(session) in (None, num_rows)


def _session(data: bytes) -> Any:
    """On the CPU, with torch's number of threads, which stop between two forwards: sessions that take turns share the cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3  # errors; they are raised as well
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _forward_ms(session: Any, images: Any) -> float:
    name = session.get_inputs()[0].name
    started = time.perf_counter()
    session.run(None, {name: images})
    return 1000 * (time.perf_counter() - started)


# --- words --------------------------------------------------------------------------------------------------------------


def _name(network: nn.Module) -> str:
    return type(network).__name__


def first_line(error: BaseException) -> str:
    """Of what was raised first: the exporter wraps it in pages of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
