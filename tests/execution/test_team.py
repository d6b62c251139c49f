"""A team has the bits of a worker that holds everything: two gloo processes on the same rows, without Ray."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline import artifacts
from pipeline.data.batches import Decoder
from pipeline.data.rows import open_source
from pipeline.data.units import Units
from pipeline.execution.drive import LocalPool, PassResult, run_pass
from pipeline.execution.ledger import Ledger
from pipeline.execution.machine import free_port
from pipeline.execution.team import Member
from pipeline.execution.worker import Pass
from pipeline.models import sharding
from pipeline.models.sharding import Network, Stored, skeleton_of
from pipeline.models.task import Task
from pipeline.models.trace import propagate
from pipeline.saliency.exact import Grid
from pipeline.saliency.statistics import GateStatistics
from pipeline.training.calibrate import BatchNormStatistics
from pipeline.training.evaluate import Evaluation
from tests.data.making import image, write_parquet

SIZE, CLASSES, ROWS = 64, 10, 44


def resnet() -> nn.Module:
    torch.manual_seed(0)
    options = {"num_classes": CLASSES, "zero_init_last": False}
    return timm.create_model("resnet18", **options).eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": SIZE, "patch_size": 8, "depth": 3, "num_classes": CLASSES}
    return timm.create_model("vit_tiny_patch16_224", **options).eval()


class WritesLater(nn.Module):
    """Writes into what a layer has read: gates have to hand on copies, which shows in a backward that breaks off."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 5), (8, 5)))
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        z = x + 1
        y = self.second(z)
        z.mul_(2)
        return self.head((y + self.third(z)).mean((2, 3)))


def writes_later() -> nn.Module:
    torch.manual_seed(0)
    return WritesLater().eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet": resnet, "vit": vit, "writes later": writes_later}


def scoring(model: nn.Module, network: Network) -> Task:
    return GateStatistics(network, propagate(model, torch.zeros(1, 3, SIZE, SIZE)), weights=True, inputs=True)


TASKS: dict[str, Callable[[nn.Module, Network], Task]] = {
    "scoring": scoring,
    "evaluation": lambda model, network: Evaluation({"dense": network}, CLASSES),
    "batch norms": lambda model, network: BatchNormStatistics({"dense": network}),
}


@dataclass(frozen=True)
class Scene:
    """A pass over 44 rows in units of 12 and micro-batches of 4: the last unit has two micro-batches, the others three."""

    name: str
    task: str
    directory: Path
    members: int = 2

    def work(self, place: str) -> Pass:
        model = NETWORKS[self.name]()
        path = self.directory / f"{self.name}.safetensors"
        if not path.exists():
            artifacts.write_tensors(str(path), model.state_dict())
        source = open_source(str(self.directory / "rows.parquet"))
        units = Units(source.row_groups, 12)
        return Pass(
            task=TASKS[self.task](model, Stored(skeleton_of(model), str(path))),
            source=source,
            units=units,
            decoder=Decoder(SIZE, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0),
            ledger=Ledger(str(self.directory / place), len(units), "fingerprint"),
            grid=None,
            micro_batch=4,
            num_classes=CLASSES,
            on_bad_row="skip",
        )


def member(rank: int, scene: Scene, place: str, address: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    sharding.MIN_ELEMENTS = 1 << 12  # small networks, several units
    worker = Member(torch.device("cpu"), 1, rank, scene.members, address)
    work = scene.work(place)
    worker.load(work)
    pilot, processor = worker.pilot()
    grid = Grid.from_pilot(pilot, num_addends=len(work.units), segments=work.task.segments)
    worker.fix_grid(grid)
    if rank == 0:
        work.ledger.fix_grid(grid, processor)
    worker.meet()
    torch.distributed.barrier()
    worker.work((0, 1))
    worker.work((2, 3))
    kept = {name for name, parameter in worker.networks[0].named_parameters() if not isinstance(parameter, DTensor)}
    assert kept == set(), f"{kept} are still gathered"


def by_a_team(scene: Scene) -> PassResult:
    address = f"127.0.0.1:{free_port()}"
    mp.spawn(member, args=(scene, "team", address), nprocs=scene.members)
    return run_pass(scene.work("team"), LocalPool(), max_bad_fraction=0.1)  # all is there: only added up


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("team")
    images = [image(3 * i, (40, 40)) for i in range(ROWS)]
    images[30] = b"no image"
    write_parquet(found / "rows.parquet", images, [i % CLASSES for i in range(ROWS)], rows_per_group=ROWS)
    return found


@pytest.mark.parametrize(
    ("network", "task", "members"),
    [
        ("writes later", "scoring", 2),
        pytest.param("writes later", "scoring", 3, marks=pytest.mark.slow),  # of 5 rows, and of 10, and of 8
        pytest.param("resnet", "scoring", 2, marks=pytest.mark.slow),
        pytest.param("vit", "scoring", 2, marks=pytest.mark.slow),
        pytest.param("resnet", "evaluation", 2, marks=pytest.mark.slow),
        pytest.param("resnet", "batch norms", 2, marks=pytest.mark.slow),
    ],
)
def test_a_team_has_the_bits_of_a_worker_that_holds_everything(network: str, task: str, members: int, directory: Path):
    scene = Scene(network, task, directory / f"{network} {task} {members}", members)
    scene.directory.mkdir()
    (scene.directory / "rows.parquet").symlink_to(directory / "rows.parquet")
    alone, team = run_pass(scene.work("alone"), LocalPool(), max_bad_fraction=0.1), by_a_team(scene)
    assert (team.rows, team.units, len(team.bad_rows)) == (alone.rows, alone.units, 1) == (ROWS - 1, 4, 1)
    assert {n: v.shape for n, v in team.values.items()} == {n: v.shape for n, v in alone.values.items()}
    differing = [name for name, value in alone.values.items() if not torch.equal(team.values[name], value)]
    assert differing == []
    assert team.sha256 == alone.sha256
