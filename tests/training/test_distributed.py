"""Three real processes over gloo, started once: what they do is `scenario`, what it must give is below.

Three, since a sum of two numbers has only one order: what a third rank could break, two would not show.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from pipeline.training.loop import TrainResult, train
from tests.training.toy import STEPS, Killed, ToyBatches, same_tensors, toy_model, toy_settings, without_times

WORKERS = 3
UNEQUAL = (4, 3, 1)
EMPTY = (8, 0, 0)


def no_norm_model() -> nn.Module:
    """Without batch norm and dropout a step is the same mathematics on any number of workers."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))


class PoisonedOnOneRank(ToyBatches):
    def __call__(self, epoch, start_step):
        for step, (images, labels) in enumerate(super().__call__(epoch, start_step)):
            yield (images * float("nan") if self.count == 1 and step == 2 else images), labels


def scenario(rank: int, world_size: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    results: dict[str, Any] = {}

    def run(name: str, directory: str, batches: ToyBatches, model: nn.Module, **changes: Any) -> TrainResult | None:
        settings = toy_settings(**{"ema_decay": 0.9, "warmup_epochs": 1} | changes)
        where = f"{folder}/{directory}" if directory else None
        try:
            result = train(
                model, None, batches, settings, steps_per_epoch=STEPS, rank=rank, world_size=world_size,
                checkpoint_dir=where, fingerprint="abc",
            )  # fmt: skip
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
            return None
        results[name] = {"state": result.state_dict, "history": result.history, "from": result.resumed_from}
        return result

    run("whole", "whole", ToyBatches(rank, UNEQUAL), toy_model())
    run("killed", "cut", ToyBatches(rank, UNEQUAL, dies_at=6), toy_model())
    run("resumed", "cut", ToyBatches(rank, UNEQUAL), toy_model())
    run("from one worker", "one", ToyBatches(rank, UNEQUAL), no_norm_model())
    run("no norm", "three", ToyBatches(rank, UNEQUAL), no_norm_model(), epochs=2, lr=0.1)
    run("empty share", "", ToyBatches(rank, EMPTY), toy_model(dropout=0.0))
    run("stale", "whole", ToyBatches(rank, UNEQUAL), toy_model(), lr=0.5)
    run("nan", "", PoisonedOnOneRank(rank, UNEQUAL), toy_model(), log_every_steps=100)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def alone(directory: str | None, model: nn.Module, dies_at: int | None = None, **changes: Any) -> TrainResult:
    settings = toy_settings(**{"ema_decay": 0.9, "warmup_epochs": 1} | changes)
    batches = ToyBatches(dies_at=dies_at)
    return train(model, None, batches, settings, steps_per_epoch=STEPS, checkpoint_dir=directory, fingerprint="abc")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("three")
    with pytest.raises(Killed):
        alone(str(folder / "one"), no_norm_model(), dies_at=6)
    mp.spawn(scenario, args=(WORKERS, str(folder)), nprocs=WORKERS)
    return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(WORKERS)]


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    # float32 sums in another order: a few units in the last place of each of 10 steps
    return all(torch.allclose(left[name], right[name], rtol=1e-5, atol=1e-6) for name in right)


def test_unequal_shares_give_the_gradient_of_the_global_mean(ranks):
    expected = alone(None, no_norm_model(), epochs=2, lr=0.1)
    assert close(ranks[0]["no norm"]["state"], expected.state_dict)
    for record, same in zip(ranks[0]["no norm"]["history"], expected.history, strict=True):
        assert record["loss"] == pytest.approx(same["loss"], rel=1e-5)
        assert record["rows"] == 8


def test_an_empty_share_changes_nothing(ranks):
    expected = alone(None, toy_model(dropout=0.0))
    assert close(ranks[0]["empty share"]["state"], expected.state_dict)


def test_resume_with_the_same_workers_is_bitwise(ranks):
    assert ranks[0]["killed"].startswith("Killed")
    assert ranks[0]["resumed"]["from"] == 4
    assert same_tensors(ranks[0]["whole"]["state"], ranks[0]["resumed"]["state"])
    assert without_times(ranks[0]["whole"]["history"]) == without_times(ranks[0]["resumed"]["history"])


def test_three_workers_go_on_from_the_checkpoint_of_one(ranks):
    assert ranks[0]["from one worker"]["from"] == 4
    assert close(ranks[0]["from one worker"]["state"], alone(None, no_norm_model()).state_dict)


def test_only_rank_0_has_the_result_and_all_have_the_history(ranks):
    assert ranks[1]["whole"]["state"] == {}
    assert ranks[1]["whole"]["history"] == ranks[0]["whole"]["history"]


def test_all_ranks_raise_the_same_error(ranks):
    assert ranks[0]["stale"].startswith("StaleArtifact")
    assert ranks[0]["stale"] == ranks[1]["stale"] == ranks[2]["stale"]
    assert ranks[0]["nan"].startswith("TrainingDiverged: loss is nan at step 2 ")
    assert ranks[0]["nan"] == ranks[1]["nan"] == ranks[2]["nan"]
