"""INT8 for ONNX Runtime: static quantisation of an ONNX file. The ranges of its activations are measured on rows of the training data.

How much accuracy that costs is not promised here but measured: `onnx.OnnxNetwork` runs the file in the same evaluation as any network.

The settings below were chosen on EfficientNet-Lite0 (ten Imagenette classes, 128 px; 512 training rows set the ranges, 1,024 validation rows;
float32: 95.12 %). Same: answers equal to the float network's. Error: of the logits, squared, relative to their variance. Time: least of 150
forwards of one row that took turns, one thread of an AMD EPYC with VNNI that did other work beside; float32: 3.45 ms.

    weights       activations   ranges               top-1    same     error     time
    per channel   uint8         least and most       95.31    99.41    0.0032    1.82 ms    what is used
    per tensor    uint8         least and most       93.85    96.29    0.0611    1.68 ms
    per channel   int8          least and most       95.12    99.41    0.0032    2.77 ms
    per channel   int8, sym.    least and most       95.21    99.22    0.0038    3.64 ms
    7 bits        uint8         least and most       95.21    98.34    0.0110    1.75 ms    where products saturate
    per channel   uint8         99.999 percentile    95.02    99.32    0.0030
    per channel   uint8         99.99 percentile     95.12    99.51    0.0029
    per channel   uint8         99.9 percentile      95.21    99.22    0.0077
    per channel   uint8         entropy              94.92    99.61    0.0031

One standard error of top-1 is 0.67 points, so the error of the logits decides. Least and most are about as good as the best percentile, took
15 s instead of 101 s, need no more memory for more rows, and are the same for every order of the rows.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import artifacts
from pipeline.export.onnx import ExportError, OnnxNetwork, first_line, require_packages

OPERATIONS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Relu", "Clip", "MaxPool")
"""Products, and what only narrows the range of their results. Additions, concatenations and the like between them become integer all the
same, since their results are quantised as inputs of the next product. Norms, softmax and the residual stream of a transformer stay float:
quantised as well they doubled the error of a small ViT's logits (0.0005 to 0.0009) for little or no time."""
FLOAT_OUTPUT = ("Gemm",)
"""Their results stay float. They are the logits of most networks, and all beyond the largest of calibration would become equal."""
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Quantised:
    """What is known about a written file; the file says it of itself, too."""

    rows: int
    """That set the ranges."""
    weight_bits: int


def settings() -> dict[str, Any]:
    """What a quantised file depends on besides the network and the rows: for fingerprints."""
    import onnxruntime

    return {"operations": OPERATIONS, "float_output": FLOAT_OUTPUT, "onnxruntime": onnxruntime.__version__}


def to_int8(source: str | Path, batches: Iterable[Tensor], path: str | Path) -> Quantised:
    """Write the ONNX file `source`, of float32, with weights of 8 bits and activations of 8 bits.

    Weights are symmetric, with a scale for each output: 0 stays 0, so masked weights stay masked. Activations are unsigned with a zero
    point, one scale for each tensor.

    Args:
        source: file or URI, with one input.
        batches: float32 [N, ...], as the network is fed; in memory is one at a time.
        path: file or URI. It appears whole, or not at all.

    Raises:
        ExportError: ONNX Runtime cannot quantise the file, or what it makes of it does not run.
        ExportUnavailable: packages are missing.
    """
    require_packages()
    network, weight_bits = OnnxNetwork(artifacts.read_bytes(str(source))), 7 if products_saturate() else 8
    rows = _Rows(network, batches)
    try:
        data = _quantise(network.data, rows, weight_bits)
        finite = bool(OnnxNetwork(data)(rows.last).isfinite().all())
    except Exception as error:
        if error is rows.failure:
            raise
        raise ExportError(
            f"{path}: ONNX Runtime cannot quantise {source}: {first_line(error)}. Use the float file, without export.int8."
        ) from error
    if not finite:
        raise ExportError(
            f"{path}: the INT8 form of {source} gives NaN or Inf. Use the float file, without export.int8."
        )
    artifacts.write_bytes(str(path), data)
    return Quantised(rows.count, weight_bits)


class _Rows:
    """Batches in the form of onnxruntime's CalibrationDataReader."""

    def __init__(self, network: OnnxNetwork, batches: Iterable[Tensor]) -> None:
        self.count, self.last = 0, torch.empty(0)
        self.failure: Exception | None = None
        """What reading a batch has raised: not the quantiser's."""
        self._feeds = self._read(network, batches)

    def _read(self, network: OnnxNetwork, batches: Iterable[Tensor]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            if len(batch):
                self.count, self.last = self.count + len(batch), batch
                yield from network.feeds(batch)
        if not self.count:
            raise ValueError("no row to measure the ranges of the activations on. Give training rows that can be read.")

    def get_next(self) -> dict[str, Any] | None:
        try:
            return next(self._feeds, None)
        except Exception as error:
            self.failure = error
            raise


def _quantise(data: bytes, rows: _Rows, weight_bits: int) -> bytes:
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as directory:
        given, prepared, quantised = (
            str(Path(directory, f"{name}.onnx")) for name in ("given", "prepared", "quantised")
        )
        Path(given).write_bytes(data)
        # Folds batch norms that the exporter has left. Shapes are there already: torch.export knows them all.
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantised,
            rows,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATIONS),
            per_channel=True,
            reduce_range=weight_bits == 7,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": list(FLOAT_OUTPUT)},
        )
        model = onnx.load(quantised)
    onnx.helper.set_model_props(model, {"calibration_rows": str(rows.count), "weight_bits": str(weight_bits)})
    return bytes(model.SerializeToString())


def about(data: bytes) -> Quantised:
    """What a file that `to_int8` has written says of itself."""
    import onnx

    props = {prop.key: prop.value for prop in onnx.load_from_string(data).metadata_props}
    if not {"calibration_rows", "weight_bits"} <= set(props):
        raise ExportError("the file does not say how it was quantised. Write it again with to_int8.")
    return Quantised(int(props["calibration_rows"]), int(props["weight_bits"]))


def products_saturate() -> bool:
    """Whether this machine adds pairs of products of 8 bits in 16 bits, where two large ones do not fit; weights of 7 bits do.

    x86 without VNNI does (the instruction VPMADDUBSW): 2 * 255 * 127 exceeds 32767, 2 * 255 * 64 does not. ARM and x86 with VNNI add in 32 bits.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = CPUINFO.read_text().split()
    except OSError:
        return True  # not to be known here
    return "avx512_vnni" not in flags and "avx_vnni" not in flags
