"""The artifact: what is saved comes back bit for bit, and what is not whole is refused by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pipeline import artifacts
from pipeline.export import artifact
from pipeline.export.artifact import ArtifactError, load, save, timm_factory
from pipeline.models.graph import Graph, Group, Member
from pipeline.pruning.masks import masked
from pipeline.pruning.plan import Plan, planned
from pipeline.pruning.surgery import cut, named_tensors
from pipeline.pruning.trials import trace
from tests.graphs import index
from tests.pruning.networks import mixed, mixed_graph

ROOT = Path(__file__).parent.parent.parent
HERE = "tests.export.test_artifact"
MIXED = "tests.pruning.networks:Mixed"
KEPT = {"stem": [0, 1, 5], "a": [2, 3, 7], "e": [1, 3], "h": [3]}


@pytest.fixture
def plan() -> Plan:
    return planned(mixed_graph(), KEPT)


@pytest.fixture
def small(plan: Plan) -> nn.Module:
    return cut(mixed(), plan)


def _same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(named_tensors(a), named_tensors(b), strict=True)
    return all(n == m and x.dtype == y.dtype and torch.equal(x, y) for (n, x), (m, y) in pairs)


def _resnet_plan(model: nn.Module) -> Plan:
    """Half of the channels inside layer1.0 of timm's test_resnet."""
    size = model.get_submodule("layer1.0.conv1").out_channels
    norm = [f"layer1.0.bn1.{tensor}" for tensor in ("weight", "bias", "running_mean", "running_var")]
    members = (
        Member("layer1.0.conv1.weight", 0, index(size), "out"),
        *[Member(name, 0, index(size), "affine") for name in norm],
        Member("layer1.0.conv2.weight", 1, index(size), "in"),
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    parameters = tuple(name for name, _ in model.named_parameters())
    graph = Graph((Group("layer1.0.conv1", size, members, ()),), (), (), shapes, parameters, (1, 3, 32, 32))
    return planned(graph, {"layer1.0.conv1": range(0, size, 2)})


# --- the way there and back -----------------------------------------------------------------------------------------


def test_a_clean_process_rebuilds_the_same_outputs_bit_for_bit(tmp_path, small, plan):
    save(small, plan, tmp_path / "out", factory=MIXED)
    _check_in_a_clean_process(tmp_path, small, torch.randn(3, 3, 4, 4))


def _check_in_a_clean_process(tmp_path: Path, small: nn.Module, images: Tensor) -> None:
    """The artifact `out` gives these logits, in the package and alone."""
    save_file({"images": images, "logits": small(images)}, tmp_path / "io.safetensors")
    code = """
import sys, torch
from safetensors.torch import load_file
io = load_file(sys.argv[2])
if sys.argv[3] == "package":
    from pipeline.export.artifact import load
    model = load(sys.argv[1])
else:
    sys.path.insert(0, sys.argv[1])
    from load import load
    model = load()
torch.set_num_threads(1)
assert torch.equal(model(io["images"]), io["logits"]) and not model.training
"""
    for way in ("package", "alone"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "io.safetensors"), way]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path)


class Stating(nn.Module):
    """Attention of torch, and code that states how many channels there are."""

    def __init__(self) -> None:
        super().__init__()
        self.fc0, self.fc1 = nn.Linear(8, 6), nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x_NLC: Tensor) -> Tensor:
        x_NLC = x_NLC + self.fc1(self.fc0(x_NLC).reshape(len(x_NLC), -1, 2 * 3).relu())
        x_NLC = x_NLC + self.attention(x_NLC, x_NLC, x_NLC, need_weights=False)[0]
        return self.head(x_NLC.mean(1))


def test_numbers_in_the_code_and_heads_of_torchs_attention_come_back_in_a_clean_process(tmp_path):
    torch.manual_seed(0)
    model = Stating().eval()
    plan = planned(trace(model, torch.zeros(2, 5, 8)), {"fc0": [0, 3], "attention": [1, 2, 3]})
    small = cut(model, plan)
    assert small.attention.num_heads == 3
    save(small, plan, tmp_path / "out", factory=f"{HERE}:Stating", input_size=(5, 8))
    assert artifact.architecture(tmp_path / "out")["functions"] == {"": [[["forward"], 1, 73, "2 * 3", 2]]}
    _check_in_a_clean_process(tmp_path, small, torch.randn(3, 5, 8))


def test_a_source_that_has_changed_since_is_refused(tmp_path):
    model = Stating().eval()
    plan = planned(trace(model, torch.zeros(2, 5, 8)), {"fc0": [0, 3]})
    save(cut(model, plan), plan, tmp_path / "out", factory=f"{HERE}:Stating")
    _edit(tmp_path / "out", functions={"": [[["forward"], 1, 73, "3 * 2", 2]]})
    with pytest.raises(ArtifactError, match=r"forward no longer reads 3 \* 2: its source has changed"):
        load(tmp_path / "out")


def test_the_standalone_loader_is_short_and_needs_no_package_of_ours(tmp_path, small, plan):
    save(small, plan, tmp_path / "out", factory=MIXED)
    text = (tmp_path / "out" / "load.py").read_text()
    imports = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imports <= {
        "ast", "collections", "functools", "importlib", "inspect", "json", "pathlib", "safetensors", "torch", "types",
        "typing",
    }  # fmt: skip
    assert len(text.splitlines()) <= 280


def test_a_timm_model_needs_no_factory(tmp_path, monkeypatch):
    dense = timm.create_model("test_resnet", num_classes=5, in_chans=1).eval()
    plan = _resnet_plan(dense)
    small = cut(dense, plan)
    save(small, plan, tmp_path / "out")
    monkeypatch.setattr("urllib.request.urlopen", None)
    loaded = load(tmp_path / "out")
    assert _same(loaded, small)
    assert loaded.layer1[0].conv1.out_channels == dense.layer1[0].conv1.out_channels // 2
    spec = artifact.architecture(tmp_path / "out")
    assert (spec["factory"], spec["factory_kwargs"]) == ("test_resnet", {"num_classes": 5, "in_chans": 1})
    assert spec["input_size"] == [1, 160, 160]


def test_a_vit_of_another_image_size_tells_its_size():
    model = timm.create_model("test_vit", num_classes=3, img_size=64)
    assert timm_factory(model) == ("test_vit", {"num_classes": 3, "img_size": [64, 64]})


def test_architecture_says_what_changed_and_what_it_was_made_from(tmp_path, small, plan):
    save(small, plan, tmp_path / "out", factory=MIXED, extra={"top1": 0.5}, input_size=(3, 4, 4))
    spec = json.loads((tmp_path / "out" / "architecture.json").read_text())
    assert spec["shapes"]["stem.weight"] == [3, 3, 3, 3]
    assert "reduce.bias" not in spec["shapes"]
    assert spec["attributes"]["grouped"] == {"groups": 2, "in_channels": 8, "out_channels": 8}
    assert spec["plan"]["sha256"] == plan.sha256()
    assert spec["costs"]["pruned"] == {"params": plan.kept.params, "macs": plan.kept.macs}
    assert (
        spec["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__ in spec["versions"]["torch"]
    )
    assert (spec["extra"], spec["input_size"]) == ({"top1": 0.5}, [3, 4, 4])


def test_the_card_has_the_three_lines_and_the_costs(tmp_path, small, plan):
    save(small, plan, tmp_path / "out", factory=MIXED, extra={"top1": 0.5})
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'import pipeline\nmodel = pipeline.load("out")' in card
    assert f"| parameters | {plan.dense.params:,} | {plan.kept.params:,} |" in card
    assert plan.sha256() in card
    assert "top1: 0.5" in card


def _masked(model: nn.Module, keep: float) -> nn.Module:
    """Each weight of a convolution keeps this fraction of its values; one of them is -0.0."""
    weights = {name: t for name, t in model.named_parameters() if t.dim() > 1}
    generator = torch.Generator().manual_seed(0)
    sparse = masked(model, {name: torch.rand(t.shape, generator=generator) < keep for name, t in weights.items()})
    next(sparse.parameters()).data.view(-1)[0] = -0.0
    return sparse


def test_a_masked_network_is_stored_without_its_zeros_and_comes_back_bit_for_bit_in_a_clean_process(tmp_path):
    dense = timm.create_model("test_resnet", num_classes=5).eval()
    sparse = _masked(dense, keep=0.1)
    for name, model in (("dense", dense), ("out", sparse)):
        save(model, _no_plan(model), tmp_path / name)
    (spec, size), (plain, dense_size) = (
        (artifact.architecture(tmp_path / name), (tmp_path / name / "model.safetensors").stat().st_size)
        for name in ("out", "dense")
    )
    assert spec["sparse"]["layer1.0.conv1.weight"] == list(sparse.layer1[0].conv1.weight.shape)
    num_weights = sum(
        t.numel() for n, t in sparse.named_parameters() if n in spec["sparse"] and n not in plain["sparse"]
    )
    # A little less by the heads of the files, and by chance in what is kept.
    assert (dense_size - size) / num_weights == pytest.approx(4 - (0.1 * 4 + 1 / 8), rel=0.03)
    assert spec["bytes"]["stored"] == size
    assert _same(load(tmp_path / "out"), sparse)
    _check_in_a_clean_process(tmp_path, sparse, torch.randn(2, 3, 64, 64))


def test_the_card_tells_the_size_and_that_zeros_gain_no_time(tmp_path, small, plan):
    save(small, plan, tmp_path / "out", factory=MIXED)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert f"The weights take {size:,} bytes.\n" in (tmp_path / "out" / "README.md").read_text()
    dense = timm.create_model("test_resnet", num_classes=5).eval()
    save(_masked(dense, keep=0.1), _no_plan(dense), tmp_path / "sparse")
    card = (tmp_path / "sparse" / "README.md").read_text()
    assert re.search(r"bytes instead of [\d,]+: \d+ tensors are stored without their zeros\.", card)
    assert "a dense runtime gains no time from them" in card


def test_an_artifact_of_the_former_format_is_read(saved, small):
    _edit(saved, format="pruned-network/2", sparse=None, bytes=None)
    assert _same(load(saved), small)


def test_a_network_that_was_cut_twice_is_stored_like_any_other(tmp_path, small):
    model = timm.create_model("test_resnet", num_classes=5).eval()
    once = cut(model, _resnet_plan(model))
    twice_plan = _resnet_plan(once)
    twice = cut(once, twice_plan)
    save(twice, twice_plan, tmp_path / "out")
    assert _same(load(tmp_path / "out"), twice)


def test_half_precision_and_modes_of_memory_come_back_in_their_dtype(tmp_path, small, plan):
    save(small.bfloat16().to(memory_format=torch.channels_last), plan, tmp_path / "out", factory=MIXED)
    assert _same(load(tmp_path / "out"), small)


class Odd(nn.Module):
    """Tied weights, a parametrised layer and a buffer that is not in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.conv = weight_norm(nn.Linear(6, 6))
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.arange(6.0), persistent=False)
        self.numbers: tuple[int, ...] = (6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.conv(self.embed(tokens)) + self.shift)


def test_ties_parametrisations_and_hidden_buffers_come_back(tmp_path):
    model = Odd()
    members = (
        Member("embed.weight", 1, index(6), "affine"),
        Member("conv.parametrizations.weight.original1", 1, index(6), "in"),
        Member("conv.parametrizations.weight.original0", 0, index(6), "out"),
        Member("conv.parametrizations.weight.original1", 0, index(6), "out"),
        Member("conv.bias", 0, index(6), "affine"),
        Member("shift", 0, index(6), "affine"),
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
    graph = Graph(
        (Group("embed", 6, members, ()),), (), (), shapes, tuple(n for n, _ in model.named_parameters()), (1, 2)
    )
    plan = planned(graph, {"embed": [0, 2, 5]})
    small = cut(model, plan)
    small.numbers = (3, 3)
    save(small, plan, tmp_path / "out", factory=f"{HERE}:Odd")
    loaded = load(tmp_path / "out")
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.shift.tolist() == [0.0, 2.0, 5.0]
    assert loaded.numbers == (3, 3)
    assert "shift" not in loaded.state_dict()
    tokens = torch.tensor([[1, 9]])
    assert torch.equal(loaded(tokens), small(tokens))


def test_saving_leaves_model_and_random_numbers_alone(tmp_path, small, plan):
    small.train()
    state = torch.get_rng_state()
    save(small, plan, tmp_path / "out", factory=MIXED, input_size=(3, 4, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in small.modules())


# --- what cannot be saved -------------------------------------------------------------------------------------------


def test_a_model_of_ones_own_is_told_to_pass_a_factory(tmp_path, small, plan):
    with pytest.raises(ArtifactError, match=r'Mixed is no timm model.*factory="package\.module:function"'):
        save(small, plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def other_activation() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.GELU())


class Doubled(nn.Module):
    """The same modules whichever way `twice` is set, and another function."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.then = [lambda x: x, lambda x: 2 * x][twice]

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.fc(x))


def _no_plan(model: nn.Module) -> Plan:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return planned(Graph((), (), (), shapes, tuple(shapes), (1, 3)), {})


def test_a_factory_that_builds_other_modules_is_refused_by_name(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with pytest.raises(ArtifactError, match=r"1: ReLU, not GELU"):
        save(model, _no_plan(model), tmp_path / "out", factory=f"{HERE}:other_activation")
    with pytest.raises(ArtifactError, match=r"fc: Linear, not nothing|0: nothing, not Linear"):
        save(Doubled(), _no_plan(Doubled()), tmp_path / "out", factory=f"{HERE}:other_activation")
    assert list(tmp_path.iterdir()) == []


def test_a_factory_that_computes_something_else_is_refused_by_its_output(tmp_path):
    model = Doubled(twice=True)
    with pytest.raises(ArtifactError, match="same weights and computes something else"):
        save(model, _no_plan(model), tmp_path / "out", factory=f"{HERE}:Doubled", input_size=(3,))
    save(model, _no_plan(model), tmp_path / "out", factory=f"{HERE}:Doubled", factory_kwargs={"twice": True})
    assert torch.equal(load(tmp_path / "out")(torch.ones(1, 3)), model(torch.ones(1, 3)))


def test_an_input_size_that_the_network_does_not_take_is_named(tmp_path, small, plan):
    with pytest.raises(ArtifactError, match=r"does not run on one row of \[3, 9, 9\].*Pass input_size"):
        save(small, plan, tmp_path / "out", factory=MIXED, input_size=(3, 9, 9))


@pytest.mark.parametrize("factory", ["no_such_model_of_timm", "no.such.module:factory", f"{HERE}:nothing"])
def test_a_factory_that_does_not_exist_is_named(tmp_path, small, plan, factory):
    with pytest.raises(ArtifactError, match=f"factory '{factory}' with"):
        save(small, plan, tmp_path / "out", factory=factory)


def test_arguments_that_are_no_json_are_refused(tmp_path, small, plan):
    with pytest.raises(ArtifactError, match="cannot be written as JSON"):
        save(small, plan, tmp_path / "out", factory=MIXED, factory_kwargs={"act": nn.ReLU})


def test_weights_are_never_fetched_by_the_factory(tmp_path):
    model = timm.create_model("test_resnet", num_classes=5).eval()
    plan = _resnet_plan(model)
    kwargs = {"pretrained": True, "num_classes": 5}
    save(cut(model, plan), plan, tmp_path / "out", factory="test_resnet", factory_kwargs=kwargs)
    assert artifact.architecture(tmp_path / "out")["factory_kwargs"] == {"num_classes": 5}


# --- whole or not at all --------------------------------------------------------------------------------------------


def test_an_interrupted_save_leaves_the_old_artifact(tmp_path, monkeypatch, small, plan):
    target = tmp_path / "out"
    save(small, plan, target, factory=MIXED)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    real = artifacts.write_bytes

    def dies(path: str, data: bytes) -> None:
        if path.endswith("architecture.json"):
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(artifacts, "write_bytes", dies)
    with pytest.raises(OSError, match="No space left"):
        save(cut(mixed(), planned(mixed_graph(), {})), plan, target, factory=MIXED)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_save_replaces_the_first(tmp_path, small, plan):
    save(small, plan, tmp_path / "out", factory=MIXED)
    (tmp_path / "out" / "stale.txt").write_text("old")
    whole = mixed()
    save(whole, planned(mixed_graph(), {}), tmp_path / "out", factory=MIXED)
    assert _same(load(tmp_path / "out"), whole)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "architecture.json", "load.py", "model.safetensors",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_directory_that_holds_something_else_is_not_replaced(tmp_path, small, plan):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="exists and is no artifact"):
        save(small, plan, tmp_path, factory=MIXED)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_artifact_lies_on_any_storage(tmp_path, small, plan):
    uri = f"file://{tmp_path}/out"
    (tmp_path / "out").mkdir()
    save(small, plan, uri, factory=MIXED)
    assert _same(load(uri), small)


# --- what is not whole ----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, small: nn.Module, plan: Plan) -> Path:
    save(small, plan, tmp_path / "out", factory=MIXED)
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["model.safetensors", "architecture.json"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        load(saved)


def test_a_path_without_an_artifact_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="none is no whole artifact"):
        load(tmp_path / "none")


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", ["model.safetensors", "architecture.json"])
def test_a_truncated_file_is_refused(saved, name, fraction):
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(ArtifactError, match=name):
        load(saved)


def test_weights_of_another_artifact_are_refused(saved, tmp_path):
    save(mixed(), planned(mixed_graph(), {}), tmp_path / "other", factory=MIXED)
    (saved / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match="of another artifact"):
        load(saved)


def _edit(saved: Path, **changes: object) -> None:
    spec = json.loads((saved / "architecture.json").read_text()) | changes
    (saved / "architecture.json").write_text(json.dumps({k: v for k, v in spec.items() if v is not None}))


def test_another_format_and_missing_parts_are_refused(saved):
    _edit(saved, tied=None)
    with pytest.raises(ArtifactError, match="lacks tied"):
        load(saved)
    _edit(saved, format="pruned-network/9")
    with pytest.raises(ArtifactError, match="format 'pruned-network/9', this version reads 'pruned-network/3'"):
        load(saved)


def test_a_factory_that_has_changed_since_is_refused_by_tensor(saved):
    _edit(saved, factory_kwargs={"width": 10}, shapes={})
    with pytest.raises(ArtifactError, match=r"do not fit in .*builds another network"):
        load(saved)
    _edit(saved, factory=f"{HERE}:other_activation", factory_kwargs={})
    with pytest.raises(ArtifactError, match="builds another network than the artifact was made from"):
        load(saved)
