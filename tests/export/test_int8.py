"""INT8: scales and outputs as worked out by hand, masked weights stay masked, the error is measured by the usual evaluation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from pipeline.export import int8
from pipeline.export.int8 import Quantised, about, products_saturate, to_int8
from pipeline.export.onnx import ExportError, ExportUnavailable, OnnxNetwork, to_onnx
from pipeline.pruning.masks import masked
from pipeline.training.evaluate import Evaluation, summarise
from tests.export.test_onnx import OneRow


@pytest.fixture(autouse=True)
def _eight_bits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has; but what is measured, is measured with the bits that it can add."""
    if "measured" not in request.keywords:
        monkeypatch.setattr(int8, "products_saturate", lambda: False)


def quantised(directory: Path, model: nn.Module, rows: Tensor) -> OnnxNetwork:
    to_onnx(model, rows[:1], directory / "float.onnx")
    to_int8(directory / "float.onnx", rows.split(4), directory / "int8.onnx")
    return OnnxNetwork((directory / "int8.onnx").read_bytes())


def constants(network: OnnxNetwork) -> dict[str, np.ndarray]:
    return {one.name: numpy_helper.to_array(one) for one in onnx.load_from_string(network.data).graph.initializer}


# --- by hand ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_the_grid() -> nn.Linear:
    """The largest weight of each output is 127 steps, of 0.01 and of 0.02."""
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[1.27, -0.64], [0.02, 2.54]])
    layer.bias.data = torch.tensor([0.5, 0.0])
    return layer


RANGE = torch.tensor([[0.0, 1.0], [2.55, 0.3], [0.1, 0.2]])
"""255 steps of 0.01 from 0 on."""


def test_scales_and_integers_of_a_hand_worked_layer(tmp_path: Path, on_the_grid: nn.Linear):
    found = constants(quantised(tmp_path, on_the_grid, RANGE))
    assert found["weight_quantized"].tolist() == [[127, -64], [1, 127]]
    assert found["weight_scale"].tolist() == pytest.approx([0.01, 0.02])
    assert found["weight_zero_point"].tolist() == [0, 0]
    assert (found["input_scale"], found["input_zero_point"]) == (pytest.approx(0.01), 0)


def test_what_lies_on_the_grid_loses_nothing_and_what_lies_beside_it_goes_to_the_nearest_point(
    tmp_path: Path, on_the_grid: nn.Linear
):
    network = quantised(tmp_path, on_the_grid, RANGE)
    exact, beside, beyond = (torch.tensor([[*row]]) for row in ((1.0, 2.0), (1.004, 1.996), (1.0, 9.0)))
    assert network(exact)[0].tolist() == pytest.approx([1.27 - 2 * 0.64 + 0.5, 0.02 + 2 * 2.54], abs=1e-5)
    assert torch.equal(network(beside), network(exact))
    assert torch.equal(network(beyond), network(torch.tensor([[1.0, 2.55]])))


def test_weights_of_seven_bits_where_sums_of_products_saturate(
    tmp_path: Path, on_the_grid: nn.Linear, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(int8, "products_saturate", lambda: True)
    network = quantised(tmp_path, on_the_grid, RANGE)
    assert constants(network)["weight_quantized"].tolist() == [[64, -32], [1, 64]]
    assert about(network.data) == Quantised(rows=3, weight_bits=7)


@pytest.mark.parametrize(
    ("machine", "flags", "saturates"),
    [
        ("x86_64", "sse4_2 avx2", True),
        ("AMD64", "avx2 avx512bw avx512_vnni", False),
        ("x86_64", "avx2 avx_vnni", False),
        ("aarch64", "asimd", False),
        ("x86_64", None, True),
    ],
)
def test_which_machines_saturate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, flags: str | None, saturates: bool
):
    monkeypatch.setattr(int8.platform, "machine", lambda: machine)
    monkeypatch.setattr(int8, "CPUINFO", tmp_path / "cpuinfo")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    assert products_saturate() == saturates


# --- networks -----------------------------------------------------------------------------------------------------------


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    norm.running_mean.uniform_(-1, 1)
    norm.weight.data.uniform_(-2, 2)
    layers = (nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)).eval()


def test_masked_weights_stay_masked(tmp_path: Path):
    torch.manual_seed(0)
    model = small_cnn()
    masks = {name: torch.rand(t.shape) < 0.3 for name, t in model.named_parameters() if t.dim() > 1}
    masks["0.weight"][2] = False  # a whole output, whose scale is that of nothing
    network = quantised(tmp_path, masked(model, masks), torch.rand(8, 3, 8, 8))
    weights = constants(network)
    for name, mask in masks.items():
        assert not weights[f"{name}_quantized"][~mask.numpy()].any()
        assert weights[f"{name}_quantized"].any()


@pytest.mark.measured
def test_accuracy_of_a_fitted_network_falls_by_less_than_a_point(tmp_path: Path):
    """Four classes by colour, the last layer fitted by least squares; both files and the network in one evaluation."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1200) % 4
    colours = torch.tensor([[1.5, 0.0, 0.0], [0.0, 1.5, 0.0], [0.0, 0.0, 1.5], [1.5, 1.5, 1.5]])
    images = colours[labels][:, :, None, None] + torch.randn(1200, 3, 8, 8, generator=generator)
    model = small_cnn()
    features = model[:-1](images[:600]).detach()
    fitted = torch.linalg.lstsq(
        torch.cat([features, torch.ones(600, 1)], 1), nn.functional.one_hot(labels[:600]).float()
    )
    model[-1].weight.data, model[-1].bias.data = fitted.solution[:-1].T.contiguous(), fitted.solution[-1]
    network = quantised(tmp_path, model, images[:64])
    models = {"torch": model, "onnx": OnnxNetwork((tmp_path / "float.onnx").read_bytes()), "int8": network}
    task = pickle.loads(pickle.dumps(Evaluation(models, 4, reference="torch")))
    task.to(torch.device("cpu"), torch.channels_last)
    found = summarise(task(images[600:].contiguous(memory_format=torch.channels_last), labels[600:]))
    assert found["torch"].top1 > 0.9
    assert (found["onnx"].top1, found["onnx"].agreement) == (found["torch"].top1, 1.0)
    assert found["int8"].top1 > found["torch"].top1 - 0.01
    assert found["int8"].agreement > 0.98
    assert found["int8"].loss == pytest.approx(found["torch"].loss, rel=0.01)


@pytest.mark.measured
def test_a_vision_transformer_keeps_its_residual_stream_in_float(tmp_path: Path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    rows = torch.randn(8, 3, 32, 32)
    network = quantised(tmp_path, model, rows)
    assert (network(rows) - model(rows)).std() < 0.05 * model(rows).std()
    graph = onnx.load_from_string(network.data).graph
    quantised_ = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    assert not [
        node for node in graph.node if node.op_type in ("LayerNormalization", "Softmax") and node.input[0] in quantised_
    ]


def test_a_file_of_one_row_takes_any_number_one_at_a_time(tmp_path: Path):
    rows = torch.rand(6, 4)
    network = quantised(tmp_path, OneRow(), rows)
    assert about(network.data).rows == 6
    assert torch.equal(network(rows), torch.cat([network(row) for row in rows.split(1)]))


# --- the network as a value ---------------------------------------------------------------------------------------------


def test_copies_hold_the_bytes_and_open_a_session_of_their_own(tmp_path: Path, on_the_grid: nn.Linear):
    to_onnx(on_the_grid, RANGE[:1], tmp_path / "float.onnx")
    network = OnnxNetwork((tmp_path / "float.onnx").read_bytes()).eval()
    logits = network(RANGE)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert (other.data, other._opened, other.training) == (network.data, None, False)
        assert torch.equal(other(RANGE), logits)
        assert other.session is not network.session


# --- refused ------------------------------------------------------------------------------------------------------------


def failing(error: Exception) -> Iterator[Tensor]:
    yield RANGE
    raise error


@pytest.mark.parametrize(
    ("batches", "error", "words"),
    [
        ([], ValueError, "no row to measure the ranges"),
        ([torch.zeros(0, 2)], ValueError, "no row to measure the ranges"),
        (failing(OSError("disk on fire")), OSError, "^disk on fire$"),
        (
            [torch.zeros(3, 5)],
            ExportError,
            r"int8\.onnx: ONNX Runtime cannot quantise .*float\.onnx: .*Use the float file",
        ),
        ([torch.tensor([[float("nan"), 0.0]])], ExportError, r"int8\.onnx: .*float\.onnx.*Use the float file"),
    ],
)
def test_what_cannot_be_quantised_leaves_what_was_there(
    tmp_path: Path, on_the_grid: nn.Linear, batches, error: type[Exception], words: str
):
    to_onnx(on_the_grid, RANGE[:1], tmp_path / "float.onnx")
    (tmp_path / "int8.onnx").write_bytes(b"as it was")
    with pytest.raises(error, match=words):
        to_int8(tmp_path / "float.onnx", batches, tmp_path / "int8.onnx")
    assert (tmp_path / "int8.onnx").read_bytes() == b"as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float.onnx", "int8.onnx"]


def test_paths_may_be_uris(tmp_path: Path, on_the_grid: nn.Linear):
    to_onnx(on_the_grid, RANGE[:1], tmp_path / "float.onnx")
    written = to_int8(f"file://{tmp_path}/float.onnx", [RANGE], f"file://{tmp_path}/int8.onnx")
    assert about((tmp_path / "int8.onnx").read_bytes()) == written == Quantised(rows=3, weight_bits=8)


def test_a_file_that_was_not_quantised_here_is_told(tmp_path: Path, on_the_grid: nn.Linear):
    to_onnx(on_the_grid, RANGE[:1], tmp_path / "float.onnx")
    with pytest.raises(ExportError, match="does not say how it was quantised"):
        about((tmp_path / "float.onnx").read_bytes())


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.export.onnx.find_spec", lambda name: None)
    with pytest.raises(ExportUnavailable, match=r"gradient-pruning-pipeline\[export\]"):
        to_int8(tmp_path / "float.onnx", [RANGE], tmp_path / "int8.onnx")
