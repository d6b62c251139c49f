"""Other runtimes: what is written computes what the network computes, or is not written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from pipeline.export import onnx
from pipeline.export.onnx import (
    ExportError,
    ExportMismatch,
    ExportUnavailable,
    check_onnx,
    check_program,
    onnx_latency,
    to_onnx,
    to_program,
)
from pipeline.pruning.plan import planned
from pipeline.pruning.surgery import cut
from tests.pruning.networks import mixed, mixed_graph

KEPT = {"stem": [0, 1, 5], "a": [2, 3, 7], "e": [1, 3], "h": [3]}
WRITE = {"onnx": to_onnx, "program": to_program}
CHECK = {"onnx": check_onnx, "program": check_program}

forms = pytest.mark.parametrize("form", WRITE)


@pytest.fixture
def small() -> nn.Module:
    return cut(mixed(), planned(mixed_graph(), KEPT))


@forms
def test_a_cut_network_comes_back_with_equal_outputs_for_any_number_of_rows(tmp_path: Path, small, form: str):
    small.train()
    small.bn.eval()
    written = WRITE[form](small, torch.zeros(1, 3, 4, 4), tmp_path / "out")
    assert written.open_batch
    assert written.difference.max_rel < 1e-5
    assert (small.training, small.bn.training) == (True, False)
    for num_rows in (1, 5):
        assert CHECK[form](tmp_path / "out", small, torch.randn(num_rows, 3, 4, 4)).max_rel < 1e-5


@forms
def test_a_vision_transformer_comes_back_with_equal_outputs(tmp_path: Path, form: str):
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    assert WRITE[form](model, torch.zeros(1, 3, 32, 32), tmp_path / "out").open_batch


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3)

    def forward(self, indices_N: Tensor, scales_N1: Tensor) -> dict[str, Tensor]:
        return {"scaled": self.table(indices_N) * scales_N1, "plain": self.table(indices_N)}


@forms
def test_indices_stay_within_their_table_and_every_output_is_compared(tmp_path: Path, form: str):
    written = WRITE[form](TwoInputs(), (torch.tensor([3]), torch.ones(1, 1)), tmp_path / "out")
    assert (written.open_batch, written.difference.rows) == (True, 3)


class OneRow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.fc(x_ND.view(1, 4))


@forms
def test_a_network_of_one_row_keeps_its_one_row(tmp_path: Path, form: str):
    written = WRITE[form](OneRow(), torch.zeros(1, 4), tmp_path / "out")
    assert (written.open_batch, written.difference.rows) == (False, 1)


class FirstForwardKeeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.kept: dict[str, Tensor] = {}

    def forward(self, x_ND: Tensor) -> Tensor:
        if "bias" not in self.kept:
            self.kept["bias"] = self.fc.bias * 2
        return self.fc(x_ND) + self.kept["bias"]


@forms
def test_what_the_first_forward_keeps_is_there_before_the_export(tmp_path: Path, form: str):
    model = FirstForwardKeeps()
    assert WRITE[form](model, torch.zeros(1, 4), tmp_path / "out").open_batch
    assert model.kept == {}


def test_a_file_tells_nothing_of_the_machine_that_wrote_it(tmp_path: Path, small):
    to_onnx(small, torch.zeros(1, 3, 4, 4), tmp_path / "out")
    data = (tmp_path / "out").read_bytes()
    assert b"stack_trace" not in data
    assert str(Path(__file__).parent.parent.parent).encode() not in data


# --- refused ------------------------------------------------------------------------------------------------------------


class OtherInExport(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.fc(x_ND) * (1.01 if torch.compiler.is_exporting() else 1.0)


@forms
def test_an_export_that_computes_something_else_leaves_what_was_there(tmp_path: Path, form: str):
    with pytest.raises(
        ExportMismatch, match=r"new: outputs differ from those of OtherInExport on 3 rows.*max_rel 0\.01"
    ):
        WRITE[form](OtherInExport(), torch.zeros(1, 4), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").write_bytes(b"as it was")
    with pytest.raises(ExportMismatch):
        WRITE[form](OtherInExport(), torch.zeros(1, 4), tmp_path / "old")
    assert (tmp_path / "old").read_bytes() == b"as it was"


class Untraceable(nn.Module):
    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND if x_ND.sum().item() > 0 else -x_ND


@forms
def test_a_network_that_cannot_be_followed_is_named(tmp_path: Path, form: str):
    with pytest.raises(ExportError, match=r"torch\.export cannot follow Untraceable"):
        WRITE[form](Untraceable(), torch.ones(1, 4), tmp_path / "out")


class Complex(nn.Module):
    def forward(self, x_ND: Tensor) -> Tensor:
        return torch.linalg.eigvals(x_ND.view(-1, 2, 2)).real


def test_a_network_without_an_onnx_form_is_named(tmp_path: Path):
    with pytest.raises(ExportError, match=r"out: Complex has no ONNX form: .*linalg_eig.*Use the artifact"):
        to_onnx(Complex(), torch.ones(1, 4), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@forms
def test_a_file_of_another_network_or_a_part_of_one_is_refused(tmp_path: Path, form: str):
    first, second = nn.Linear(4, 2), nn.Linear(4, 2)
    path, row = tmp_path / "out", torch.randn(1, 4)
    WRITE[form](first, row, path)
    with pytest.raises(ExportMismatch, match="outputs differ"):
        CHECK[form](path, second, row)
    with pytest.raises(ExportMismatch, match="outputs have shapes"):
        CHECK[form](path, nn.Linear(4, 3), row)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ExportError, match=r"out: .* cannot run it"):
        CHECK[form](path, first, row)


@forms
def test_an_example_without_rows_tells_nothing(tmp_path: Path, form: str):
    with pytest.raises(ValueError, match="at least one row"):
        WRITE[form](nn.Linear(4, 2), torch.zeros(0, 4), tmp_path / "out")


def test_missing_packages_are_named_with_the_way_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ExportUnavailable, match=r'needs onnxscript.*pip install "gradient-pruning-pipeline\[export\]"'):
        to_onnx(nn.Linear(4, 2), torch.zeros(1, 4), tmp_path / "out")
    to_program(nn.Linear(4, 2), torch.zeros(1, 4), tmp_path / "out")


# --- time ---------------------------------------------------------------------------------------------------------------


def test_latencies_are_plain_data_and_a_file_of_fixed_rows_is_timed_at_those(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.training.latency.WARMUP_S", 0.0)
    to_onnx(nn.Linear(4, 2), torch.zeros(1, 4), tmp_path / "open")
    to_onnx(OneRow(), torch.zeros(1, 4), tmp_path / "one")
    found = onnx_latency({name: tmp_path / name for name in ("open", "one")}, (4,), batch_sizes=(1, 3), runs=3)
    assert json.loads(json.dumps(found)) == found
    assert {size: set(files) for size, files in found["batch"].items()} == {"1": {"open", "one"}, "3": {"open"}}
    assert (found["device"], found["threads"], found["runs"]) == ("cpu", 1, 3)
    assert found["batch"]["3"]["open"]["rows_per_s"] == 3000 / found["batch"]["3"]["open"]["median_ms"]
