"""Two real processes over gloo, started once, hold one network together: what they do is `scenario`, what it must give is below."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from pipeline import artifacts
from pipeline.artifacts import StorageError
from pipeline.models import sharding
from pipeline.models.sharding import Network, Sharded, Stored, build_mesh, skeleton_of, units, whole
from pipeline.training import checkpoint
from pipeline.training.dynamic import Masked
from pipeline.training.loop import TrainResult, train
from pipeline.training.policy import Movement
from tests.object_store import ObjectStore
from tests.training.toy import CLASSES, STEPS, Killed, ToyBatches, same_tensors, toy_model, toy_settings, without_times

SHARES = (5, 3)
WIDTH = 7  # no multiple of two: the last rank has fewer rows
RECIPE = {"epochs": 2, "ema_decay": 0.9, "warmup_epochs": 1, "clip_grad_norm": 0.5, "label_smoothing": 0.1}
FOLLOWS = {"distill_weight": 0.5}
OPTIMIZERS = {"sgd": {"optimizer": "sgd", "lr": 0.02}, "adamw": {"optimizer": "adamw", "lr": 0.02}}


class Block(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(
            WIDTH, 1, bias=False, batch_first=True
        )  # reads out_proj.weight and never calls it
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 9), nn.SiLU(inplace=True), nn.Linear(9, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.mlp(self.attention(y, y, y, need_weights=False)[0])


class Odd(nn.Module):
    """What sharding could get wrong: few rows, no dimensions, tied weights, a block that runs twice, a view that is changed in place,
    a buffer that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.blocks = nn.ModuleList([Block(0), Block(1)])
        self.encoder, self.decoder = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.decoder.weight = self.encoder.weight
        self.head = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("shift", torch.full((WIDTH,), 0.1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), 1, WIDTH), x], 1) + self.shift
        for block in (self.blocks[0], self.blocks[1], self.blocks[0]):
            x = block(x)
        x = self.decoder(torch.tanh(self.encoder(x)))
        return self.head(x.mean(1) * self.gain)


class ReadsWeights(nn.Module):
    """Uses the weights of a member of a container without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(108, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.linear(images.flatten(1), self.layers[1].weight)


@dataclass
class Output:
    """What torch cannot look into."""

    logits: Tensor


class Wraps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(108, CLASSES)

    def forward(self, images: Tensor) -> Output:
        return Output(self.linear(images.flatten(1)))


class ReturnsItsOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Wraps()])

    def forward(self, images: Tensor) -> Tensor:
        return self.layers[0](images).logits


def odd(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Odd()


def stored(model: nn.Module, path: str) -> Stored:
    artifacts.write_tensors(path, model.state_dict())
    return Stored(skeleton_of(model), path)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    named = dict(model.named_parameters())
    return {
        name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in named.items() if p.dim() > 1 and len(p) > 1
    }


class PoisonedOnOneRank(ToyBatches):
    def __call__(self, epoch, start_step):
        for step, (images, labels) in enumerate(super().__call__(epoch, start_step)):
            yield (images * float("nan") if self.first and step == 2 else images), labels


def alone(model: Network, directory: str | None = None, *, teacher: Network | None = None, dies_at: int | None = None,
          policies: Sequence[Any] = (), result_path: str | None = None, **changes: Any) -> TrainResult:  # fmt: skip
    settings = toy_settings(**{**RECIPE, **changes})
    return train(
        model, teacher, ToyBatches(dies_at=dies_at), settings, steps_per_epoch=STEPS, policies=policies, checkpoint_dir=directory,
        result_path=result_path, fingerprint="abc",
    )  # fmt: skip


# --- the processes ----------------------------------------------------------------------------------------------------


def join(rank: int, world_size: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    sharding.MIN_ELEMENTS = 1  # every candidate is a unit
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)


class Results(dict[str, Any]):
    """What each training has given on this rank, or its error."""

    def __init__(self, rank: int, world_size: int, folder: str, shares: tuple[int, ...]) -> None:
        super().__init__()
        self.rank, self.world_size, self.folder, self.shares = rank, world_size, folder, shares

    def run(
        self, name: str, model: Network, directory: str = "", *, teacher: Network | None = None, shard_over: int = 2,
        batches: Callable[..., ToyBatches] = ToyBatches, dies_at: int | None = None, policies: Sequence[Any] = (),
        shares: tuple[int, ...] | None = None, result: str = "", **changes: Any,
    ) -> None:  # fmt: skip
        where = directory if "://" in directory else f"{self.folder}/{directory}"
        try:
            found = train(
                model, teacher, batches(self.rank, shares or self.shares, dies_at), toy_settings(**{**RECIPE, **changes}),
                steps_per_epoch=STEPS, policies=policies, rank=self.rank, world_size=self.world_size, shard_over=shard_over,
                checkpoint_dir=where if directory else None, result_path=f"{self.folder}/{result}" if result else None,
                fingerprint="abc",
            )  # fmt: skip
        except Exception as error:
            self[name] = f"{type(error).__name__}: {error}"
            return
        self[name] = {"state": found.state_dict, "history": found.history, "from": found.resumed_from}

    def save(self) -> None:
        torch.save(dict(self), f"{self.folder}/rank{self.rank}.pt")
        dist.destroy_process_group()


def started(scenario: Callable[..., None], folder: Path, num_workers: int) -> list[dict[str, Any]]:
    mp.spawn(scenario, args=(num_workers, str(folder)), nprocs=num_workers)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(num_workers)]


def short_scenario(rank: int, world_size: int, folder: str) -> None:
    join(rank, world_size, folder)
    results = Results(rank, world_size, folder, SHARES)
    results.run("killed", odd(), "cut", dies_at=6)
    with counted_reads() as count:
        results.run(
            "resumed", Stored(skeleton_of(odd()), f"{folder}/odd.safetensors"), "cut", result="result.safetensors"
        )
    results["bytes"] = count[0]
    results.save()


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """Bytes that are read of the values in files."""
    really, count = sharding._TensorFile._read_into, [0]

    def read_into(self: Any, tensor: Tensor) -> None:
        count[0] += tensor.nbytes
        really(self, tensor)

    sharding._TensorFile._read_into = read_into
    yield count
    sharding._TensorFile._read_into = really


def scenario(rank: int, world_size: int, folder: str) -> None:
    join(rank, world_size, folder)
    results = Results(rank, world_size, folder, SHARES)
    run = results.run
    for optimizer in OPTIMIZERS:
        run(optimizer, odd(), teacher=odd(1), **OPTIMIZERS[optimizer], **FOLLOWS)
    run("bf16", odd(), amp="bf16")
    run("with norms", toy_model())
    run("with norms, DDP", toy_model(), shard_over=1)
    run("empty share", odd(), teacher=odd(1), shares=(8, 0), **FOLLOWS)

    adamw = OPTIMIZERS["adamw"]
    run("whole", odd(), "whole", **adamw)
    run("killed", odd(), "cut", dies_at=6, **adamw)
    run("resumed", odd(), "cut", **adamw)
    run("for one", odd(), "for one", dies_at=6, **adamw)
    run("from one", odd(), "from one", **adamw)
    run("for DDP", odd(), "for DDP", dies_at=6)
    run("DDP", odd(), "for DDP", shard_over=1)
    run("stale", odd(), "whole", **{**adamw, "lr": 0.5})
    uri = (Path(folder) / "uri").read_text()
    run("killed on a URI", odd(), uri, dies_at=6)
    run("on a URI", odd(), uri)

    masked = [partial(Masked, masks=masks_of(odd()))]
    run("masked", odd(), policies=masked)
    run("masked for one", odd(), "masked for one", policies=masked, dies_at=6)
    run("masked from one", odd(), "masked from one", policies=masked)
    run(
        "other masks", odd(), policies=[partial(Masked, masks={"head.weight": torch.full((CLASSES, WIDTH), rank == 0)})]
    )
    run("movement", odd(), policies=[Movement])
    run("three", odd(), shard_over=3)
    run("nan", odd(), batches=PoisonedOnOneRank, log_every_steps=100)
    run("weights read", ReadsWeights())
    run("made up outputs", ReturnsItsOwn())

    file = f"{folder}/odd.safetensors"
    run("from file", Stored(skeleton_of(odd()), file), teacher=Stored(skeleton_of(odd(1)), f"{folder}/teacher.safetensors"),
        result="result.safetensors", **OPTIMIZERS["sgd"], **FOLLOWS)  # fmt: skip
    run(
        "no file",
        Stored(skeleton_of(odd()), f"{folder}/none.safetensors") if rank else Stored(skeleton_of(odd()), file),
    )
    run("no room", odd(), result="a file/result.safetensors")
    full_disk(results)

    cut_off_save(results)
    damaged(results)
    sharded = Sharded(odd(), build_mesh(2, 2, torch.device("cpu")), torch.device("cpu"))  # type: ignore[arg-type]
    results["rows"] = {name: list(p.shape) for name, p in sharded.rows.named_parameters()}
    results.save()


def full_disk(results: Results) -> None:
    """Rank 0 cannot write on in the middle of the result."""
    really = artifacts.write_parts

    def write_parts(path: str, parts: Any) -> None:
        next(parts), next(parts)
        raise StorageError(28, "no space left")

    artifacts.write_parts = write_parts
    results.run("full disk", odd(), result="result-2.safetensors")
    artifacts.write_parts = really


def cut_off_save(results: Results) -> None:
    """The second save ends when the rows are written and the .pt is not."""
    really = checkpoint.save

    def save(directory: str, state: Any) -> str:
        if state["step"] == 8:
            raise Killed
        return really(directory, state)

    checkpoint.save = save
    results.run("cut off", odd(), "cut off")
    checkpoint.save = really
    results.run("after the cut", odd(), "cut off")


def damaged(results: Results) -> None:
    """A byte of rank 1's rows of step 8 is another."""
    results.run("before the damage", odd(), "damaged", dies_at=9)
    if results.rank == 0:
        file = Path(f"{results.folder}/damaged/step-00000008/__1_0.distcp")
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    dist.barrier()
    results.run("after the damage", odd(), "damaged")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("short")
    artifacts.write_tensors(str(folder / "odd.safetensors"), odd().state_dict())
    return folder, started(short_scenario, folder, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def uri(folder: Path) -> Iterator[str]:
    with ObjectStore("s3") as store:
        (folder / "uri").write_text(store.uri("bucket/run"))
        yield store.uri("bucket/run")


@pytest.fixture(scope="module")
def ranks(folder: Path, uri: str) -> list[dict[str, Any]]:
    with pytest.raises(Killed):
        alone(odd(), str(folder / "from one"), dies_at=6, **OPTIMIZERS["adamw"])
    with pytest.raises(Killed):
        alone(odd(), str(folder / "masked from one"), dies_at=6, policies=[partial(Masked, masks=masks_of(odd()))])
    artifacts.write_tensors(str(folder / "odd.safetensors"), odd().state_dict())
    artifacts.write_tensors(str(folder / "teacher.safetensors"), odd(1).state_dict())
    (folder / "a file").touch()
    return started(scenario, folder, 2)


def close(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    # float32 sums in another order: a few units in the last place of each of 10 steps
    return left.keys() == right.keys() and all(
        torch.allclose(left[name].double(), right[name].double(), rtol=1e-5, atol=1e-6) for name in right
    )


# --- in short ---------------------------------------------------------------------------------------------------------


def test_two_ranks_that_hold_a_network_together_train_what_one_process_trains_also_after_a_resume(short):
    folder, ranks = short
    expected = alone(odd())
    assert [one["killed"] for one in ranks] == ["Killed: "] * 2
    assert [one["resumed"]["from"] for one in ranks] == [4, 4]
    assert close(load_file(folder / "result.safetensors"), expected.state_dict)
    for record, same in zip(ranks[0]["resumed"]["history"], expected.history, strict=True):
        assert record["loss"] == pytest.approx(same["loss"], rel=1e-5)
        assert record["rows"] == same["rows"] == 8
    with safe_open(folder / "result.safetensors", framework="pt") as file:
        assert file.metadata() == {"fingerprint": "abc"}


def test_a_rank_reads_its_own_rows(short):
    _, ranks = short
    model = odd()
    each = [sum(-(-len(p) // 2) * p[0].numel() for p in model.parameters() if p.dim()) * 4]
    scalars = 4
    assert ranks[0]["bytes"] == each[0] + scalars
    assert ranks[0]["bytes"] + ranks[1]["bytes"] == sum(p.numel() for p in model.parameters()) * 4 + scalars


# --- the same training ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_everything_together_gives_what_one_process_gives(ranks, optimizer):
    expected = alone(odd(), teacher=odd(1), **OPTIMIZERS[optimizer], **FOLLOWS)
    assert close(ranks[0][optimizer]["state"], expected.state_dict)
    assert ranks[1][optimizer]["state"] == {}
    assert ranks[1][optimizer]["history"] == ranks[0][optimizer]["history"]
    assert [record["loss"] for record in ranks[0][optimizer]["history"]] == pytest.approx(
        [record["loss"] for record in expected.history], rel=1e-5
    )


@pytest.mark.slow
def test_an_empty_share_changes_nothing_also_with_a_teacher(ranks):
    assert close(ranks[0]["empty share"]["state"], alone(odd(), teacher=odd(1), **FOLLOWS).state_dict)


@pytest.mark.slow
def test_autocast_is_that_of_one_process(ranks):
    expected = alone(odd(), amp="bf16").state_dict
    for name, value in ranks[0]["bf16"]["state"].items():
        assert torch.allclose(value, expected[name], atol=2e-2), (
            name
        )  # bf16 has 8 bits, and a batch in two parts rounds anew
    assert not close(expected, alone(odd()).state_dict)


@pytest.mark.slow
def test_batch_norms_and_dropout_are_those_of_ddp(ranks):
    assert close(ranks[0]["with norms"]["state"], ranks[0]["with norms, DDP"]["state"])


@pytest.mark.slow
def test_each_rank_holds_its_rows(ranks):
    for name, parameter in odd().named_parameters():
        first, second = (one["rows"][name] for one in ranks)
        if not parameter.dim():
            assert first == second == []
            continue
        assert first == [-(-len(parameter) // 2), *parameter.shape[1:]]
        assert first[0] + second[0] == len(parameter)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_resume_with_the_same_workers_is_bitwise(ranks):
    assert ranks[0]["killed"].startswith("Killed")
    assert ranks[0]["resumed"]["from"] == 4
    assert same_tensors(ranks[0]["whole"]["state"], ranks[0]["resumed"]["state"])
    assert without_times(ranks[0]["whole"]["history"]) == without_times(ranks[0]["resumed"]["history"])


@pytest.mark.slow
def test_one_process_goes_on_from_the_checkpoint_of_two(ranks, folder):
    resumed = alone(odd(), str(folder / "for one"), **OPTIMIZERS["adamw"])
    assert resumed.resumed_from == 4
    assert close(resumed.state_dict, alone(odd(), **OPTIMIZERS["adamw"]).state_dict)
    assert not (folder / "for one" / "step-00000004").exists()  # of the two that are kept the older is 8


@pytest.mark.slow
def test_two_go_on_from_the_checkpoint_of_one(ranks):
    assert ranks[0]["from one"]["from"] == 4
    assert close(ranks[0]["from one"]["state"], ranks[0]["whole"]["state"])


@pytest.mark.slow
def test_ranks_that_hold_it_all_go_on_from_the_checkpoint_of_those_that_do_not(ranks):
    assert ranks[0]["DDP"]["from"] == 4
    assert close(ranks[0]["DDP"]["state"], alone(odd()).state_dict)


@pytest.mark.slow
def test_an_object_store_is_as_good_as_a_path(ranks, uri):
    assert ranks[0]["on a URI"]["from"] == 4
    assert close(ranks[0]["on a URI"]["state"], alone(odd()).state_dict)
    assert artifacts.list_dir(uri) == ["step-00000008", "step-00000008.pt", "step-00000010", "step-00000010.pt"]


@pytest.mark.slow
def test_two_checkpoints_are_kept_with_their_rows_and_foreign_ones_refused(ranks, folder):
    names = sorted(path.name for path in (folder / "whole").iterdir())
    assert names == ["step-00000008", "step-00000008.pt", "step-00000010", "step-00000010.pt"]
    assert ranks[0]["stale"].startswith("StaleArtifact: ")
    assert "settings.lr: 0.02 -> 0.5" in ranks[0]["stale"]
    assert ranks[0]["stale"] == ranks[1]["stale"]


@pytest.mark.slow
def test_a_save_that_was_cut_off_leaves_the_checkpoint_before_it(ranks):
    assert [one["cut off"] for one in ranks] == ["Killed: "] * 2
    assert ranks[0]["after the cut"]["from"] == 4
    assert close(ranks[0]["after the cut"]["state"], alone(odd()).state_dict)


@pytest.mark.slow
def test_rows_that_are_damaged_are_passed_over(ranks, folder):
    assert ranks[0]["before the damage"].startswith("Killed")
    assert [one["after the damage"]["from"] for one in ranks] == [4, 4]
    assert close(ranks[0]["after the damage"]["state"], alone(odd()).state_dict)


# --- networks in files ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_network_and_a_teacher_from_files_train_as_those_in_memory(ranks, folder):
    assert ranks[0]["from file"]["state"] == {}
    assert same_tensors(load_file(folder / "result.safetensors"), ranks[0]["sgd"]["state"])


def test_one_process_reads_a_stored_network_and_writes_its_result_too(tmp_path):
    network = stored(odd(), str(tmp_path / "odd.safetensors"))
    result = alone(network, result_path=str(tmp_path / "result.safetensors"))
    assert result.state_dict == {}
    assert same_tensors(load_file(tmp_path / "result.safetensors"), alone(odd()).state_dict)


def test_a_skeleton_has_no_values_and_ties_what_was_tied(tmp_path):
    model = odd()
    network = stored(model, str(tmp_path / "odd.safetensors"))
    assert all(p.is_meta for p in network.skeleton.parameters())
    assert network.skeleton.shift.tolist() == model.shift.tolist()
    read = whole(network)
    assert read.decoder.weight is read.encoder.weight
    assert same_tensors(dict(read.state_dict()), dict(model.state_dict()))


def test_of_tied_weights_one_name_in_the_file_is_enough(tmp_path):
    path = str(tmp_path / "odd.safetensors")
    artifacts.write_tensors(path, {n: v for n, v in odd().state_dict().items() if n != "encoder.weight"})
    assert same_tensors(dict(whole(Stored(skeleton_of(odd()), path)).state_dict()), dict(odd().state_dict()))


def test_a_file_of_another_network_is_refused(tmp_path):
    network = stored(toy_model(), str(tmp_path / "toy.safetensors"))
    with pytest.raises(
        ValueError, match=r"toy.safetensors holds nothing for token \[1, 1, 7\]: it is of another network"
    ):
        whole(Stored(skeleton_of(odd()), network.path))


def test_a_file_that_ends_too_early_is_refused(tmp_path):
    network = stored(odd(), str(tmp_path / "odd.safetensors"))
    data = (tmp_path / "odd.safetensors").read_bytes()
    (tmp_path / "odd.safetensors").write_bytes(data[:-100])
    with pytest.raises(StorageError, match="ends too early"):
        whole(network)


# --- policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masked", "masked from one"])
def test_masks_hold_on_rows_and_train_what_one_process_trains(ranks, name):
    masks = masks_of(odd())
    expected = alone(odd(), policies=[partial(Masked, masks=masks)])
    state = ranks[0][name]["state"]
    assert close(state, expected.state_dict)
    assert all(bool((state[key][~mask] == 0).all()) for key, mask in masks.items())
    for record, same in zip(ranks[0][name]["history"], expected.history, strict=True):
        assert (record["zeros"], record["masked"]) == pytest.approx((same["zeros"], same["masked"]), rel=1e-6)
    layers = ranks[1][name]["history"][-1]["layers"]
    assert layers.keys() == expected.history[-1]["layers"].keys()
    for key, shares in expected.history[-1]["layers"].items():
        assert layers[key] == pytest.approx(shares, abs=1e-12)


@pytest.mark.slow
def test_one_process_goes_on_with_the_masks_of_two(ranks, folder):
    policies = [partial(Masked, masks=masks_of(odd()))]
    resumed = alone(odd(), str(folder / "masked for one"), policies=policies)
    assert resumed.resumed_from == 4
    assert close(resumed.state_dict, alone(odd(), policies=policies).state_dict)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("other masks", "RanksDiffer: the ranks hold different masks"),
        ("movement", "ValueError: Movement needs whole weights, and shard_over (2) leaves each rank with some rows"),
        (
            "three",
            "ValueError: shard_over (3) ranks hold a network together, and 2 ranks are not a multiple of that. Choose 1, 2,",
        ),
        ("nan", "TrainingDiverged: loss is nan at step 2 "),
        ("weights read", "ValueError: the network uses weights of a member of an nn.Sequential"),
        ("made up outputs", "ValueError: Wraps returns Output; a module whose weights are gathered on their own"),
        ("no file", "StorageError: [Errno 2] cannot read"),
        ("no room", "StorageError: [Errno 17] cannot write"),
        ("full disk", "StorageError: [Errno 28] no space left"),
    ],
)
def test_what_cannot_be_is_the_same_error_on_all_ranks(ranks, name, error):
    assert ranks[0][name].startswith(error)
    assert ranks[0][name] == ranks[1][name]


# --- what is gathered at a time ---------------------------------------------------------------------------------------


def names_of(model: nn.Module, min_elements: int) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return sorted(names[id(unit)] for unit in units(model, min_elements))


def test_units_are_blocks_and_what_a_sequential_calls_but_nothing_that_is_tied():
    blocks = [f"blocks.{i}{inner}" for i in (0, 1) for inner in ("", ".mlp.0", ".mlp.2")]
    assert names_of(odd(), 1) == blocks
    assert names_of(odd(), 100) == ["blocks.0", "blocks.1"]  # 72 weights of a linear layer are gathered with its block
    assert names_of(odd(), 10_000) == []
    model = odd()
    model.head.weight = nn.Parameter(torch.zeros(CLASSES, WIDTH))
    model.blocks[0].norm.weight = model.blocks[1].norm.weight
    assert names_of(model, 100) == []
    shared = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    shared.append(shared[0])
    assert names_of(shared, 1) == ["2"]


def test_units_of_real_networks():
    assert names_of(vit(), 1000) == ["blocks.0", "blocks.1"]
    inner = [f"stages.{i}.{part}" for i, part in ((1, "blocks.0"), (1, "blocks.1"), (2, "blocks.0"), (3, "blocks.0"))]
    assert names_of(convnext(), 1000) == sorted([*inner, "stages.2.downsample.1", "stages.3.downsample.1"])
    assert {"layer1.0", "layer2.0", "layer3.0", "layer4.0"} <= set(names_of(resnet(), 1000))


# --- real networks, and replicas of networks that are held together -------------------------------------------------------


def vit() -> nn.Module:
    options = {"img_size": 36, "patch_size": 12, "depth": 2, "embed_dim": 24, "num_heads": 3}
    return seeded(lambda: timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **options))


def resnet() -> nn.Module:
    options = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (8, 16, 24, 33), "zero_init_last": False}
    return seeded(lambda: ResNet(num_classes=CLASSES, stem_type="deep", stem_width=4, **options))


def convnext() -> nn.Module:
    options = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)}
    return seeded(lambda: timm.create_model("convnext_atto", num_classes=CLASSES, **options))


NETWORKS = {"vit": vit, "resnet": resnet, "convnext": convnext}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


class LargeBatches(ToyBatches):
    """Of 36 x 36 pixels."""

    def __call__(self, epoch, start_step):
        for images, labels in super().__call__(epoch, start_step):
            yield images.repeat_interleave(6, 2).repeat_interleave(6, 3), labels


def four_scenario(rank: int, world_size: int, folder: str) -> None:
    join(rank, world_size, folder)
    results = Results(rank, world_size, folder, (3, 2, 2, 1))
    results.run("sgd", odd(), teacher=odd(1), **OPTIMIZERS["sgd"], **FOLLOWS)
    results.run("masked", odd(), "whole", policies=[partial(Masked, masks=masks_of(odd()))])
    results.run("killed", odd(), "cut", policies=[partial(Masked, masks=masks_of(odd()))], dies_at=6)
    results.run("resumed", odd(), "cut", policies=[partial(Masked, masks=masks_of(odd()))])
    results.run("held by four", odd(), shard_over=4)
    results.run("for one", odd(), "for one", dies_at=6, shard_over=4)
    for name, make in NETWORKS.items():
        # Of one row DDP would warn: its strides may be read in two ways.
        options = {"batches": LargeBatches, "lr": 0.02, "epochs": 1, "warmup_epochs": 0.5, "shares": (2, 2, 2, 2)}
        results.run(name, make(), **options)
        results.run(f"{name}, DDP", make(), shard_over=1, **options)
    results.save()


@pytest.fixture(scope="module")
def four_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("four")


@pytest.fixture(scope="module")
def four(four_folder: Path) -> list[dict[str, Any]]:
    return started(four_scenario, four_folder, 4)


@pytest.mark.slow
def test_two_replicas_of_two_ranks_train_what_one_process_trains(four):
    assert close(four[0]["sgd"]["state"], alone(odd(), teacher=odd(1), **OPTIMIZERS["sgd"], **FOLLOWS).state_dict)
    expected = alone(odd(), policies=[partial(Masked, masks=masks_of(odd()))])
    assert close(four[0]["masked"]["state"], expected.state_dict)
    assert four[3]["masked"]["history"][-1]["zeros"] == pytest.approx(expected.history[-1]["zeros"], rel=1e-6)
    assert four[0]["resumed"]["from"] == 4
    assert same_tensors(four[0]["masked"]["state"], four[0]["resumed"]["state"])


@pytest.mark.slow
def test_four_ranks_hold_what_has_fewer_rows_than_ranks(four, four_folder):
    assert close(four[0]["held by four"]["state"], alone(odd()).state_dict)
    resumed = alone(odd(), str(four_folder / "for one"))
    assert resumed.resumed_from == 4
    assert close(resumed.state_dict, alone(odd()).state_dict)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_real_networks_train_as_with_ddp(four, name):
    assert close(four[0][name]["state"], four[0][f"{name}, DDP"]["state"])
