"""Training on a real local Ray: a worker is killed with SIGKILL, and a mistake of the user is not retried."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.execution.train import fit
from pipeline.training.loop import TrainingDiverged, train
from tests.training.toy import STEPS, ToyBatches, toy_settings

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray Train's own, on importing Ray Data
]

SHARES = (5, 3)


@dataclass(frozen=True)
class SlowBatches:
    """The toy's batches, a few a second; each worker leaves its process id in `folder`."""

    folder: str
    poisoned_step: int = -1

    def __call__(self, rank: int, world_size: int) -> _Share:
        (Path(self.folder) / f"rank{rank}-{os.getpid()}").touch()
        return _Share(ToyBatches(rank, SHARES), self.poisoned_step)


@dataclass(frozen=True)
class _Share:
    batches: ToyBatches
    poisoned_step: int

    def __call__(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step, (images, labels) in enumerate(self.batches(epoch, start_step), start=start_step):
            time.sleep(0.3)
            yield images * (float("nan") if epoch * STEPS + step == self.poisoned_step else 1.0), labels


def model() -> nn.Module:
    """Without batch norm and dropout a step is the same mathematics on any number of workers."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))


def pids(folder: Path, rank: int) -> list[int]:
    return [int(path.name.split("-")[1]) for path in folder.glob(f"rank{rank}-*")]


def test_training_goes_on_where_a_killed_worker_left_it(ray_cluster, tmp_path):
    (tmp_path / "pids").mkdir()
    killed = []

    def kill_once(history):
        if history[-1]["step"] >= 6 and not killed:
            killed.extend(pids(tmp_path / "pids", rank=1))
            os.kill(killed[0], signal.SIGKILL)

    settings = toy_settings(epochs=6, ema_decay=0.9, checkpoint_every_steps=4)
    result = fit(
        model(),
        None,
        SlowBatches(str(tmp_path / "pids")),
        settings,
        steps_per_epoch=STEPS,
        fingerprint="abc",
        directory=str(tmp_path / "checkpoints"),
        num_workers=2,
        max_failures=1,
        on_progress=kill_once,
    )
    assert len(pids(tmp_path / "pids", rank=1)) == 2
    assert result.resumed_from in range(4, 30, 4)
    assert [record["step"] for record in result.history] == list(range(1, 31))
    expected = train(model(), None, ToyBatches(), settings, steps_per_epoch=STEPS)
    for name, tensor in expected.state_dict.items():
        torch.testing.assert_close(result.state_dict[name], tensor, rtol=1e-4, atol=1e-5)


def test_nan_is_raised_as_itself_and_not_retried(ray_cluster, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    (tmp_path / "pids").mkdir()
    with pytest.raises(TrainingDiverged, match=r"loss is nan at step 3 \(epoch 0, step 3 of 5\)") as raised:
        fit(
            model(),
            None,
            SlowBatches(str(tmp_path / "pids"), poisoned_step=3),
            toy_settings(),
            steps_per_epoch=STEPS,
            fingerprint="abc",
            directory=str(tmp_path / "checkpoints"),
            num_workers=2,
        )
    assert "in training worker" in raised.value.__notes__[0]
    assert "Traceback" in raised.value.__notes__[0]
    assert len(pids(tmp_path / "pids", rank=0)) == 1
    assert signal.getsignal(signal.SIGINT) is handler
