"""Two real processes over gloo, started once, train with every method: what they do is `scenario`, what it must give is below."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from pipeline.models.graph import Graph
from pipeline.pruning import allocation
from pipeline.pruning.plan import Budget, Plan
from pipeline.pruning.trials import trace
from pipeline.training.dynamic import Masked, RigL, SoftFilter
from pipeline.training.gates import channel_gates
from pipeline.training.loop import TrainResult, train
from pipeline.training.policies import METHODS, Aim, policies
from pipeline.training.policy import MakePolicy, Policy, Training, agreed
from tests.training.sparse import BATCH, CLASSES, STEPS, WEIGHTS, Batches, settings
from tests.training.toy import same_tensors, without_times

WORKERS = 2
BUDGET = Budget(params=0.5)
OF_WEIGHTS = " of weights"
TOGETHER = ["l1_prox + rigl", "group_lasso + rigl", f"l1_prox + hard_concrete{OF_WEIGHTS}"]
CASES = [*METHODS, f"hard_concrete{OF_WEIGHTS}", *TOGETHER]
BY_SIGN = {"l1_sign", "l0_sign", f"hard_concrete{OF_WEIGHTS}", f"l1_prox + hard_concrete{OF_WEIGHTS}"}
"""Sign steps, and Adam for gates: where a gradient is next to nothing, rounding decides the direction of a whole step."""


def network() -> nn.Module:
    """Norms of one row at a time: a step is the same mathematics on any number of workers. No kinks, which make rounding visible."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.InstanceNorm2d(16, affine=True),
        nn.SiLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.InstanceNorm2d(16, affine=True),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )
    for norm in (model[1], model[4]):
        nn.init.zeros_(norm.bias)
        norm.weight.data = torch.linspace(0.2, 2.0, 16)  # as if trained: not all channels go to zero at once
    return model


def traced() -> Graph:
    return trace(network(), torch.zeros(1, 3, 6, 6))


def made(case: str, graph: Graph) -> list[MakePolicy]:
    methods = case.removesuffix(OF_WEIGHTS).split(" + ")
    on_channels = any(METHODS[name].acts_on in ("channels", "either") for name in methods) and OF_WEIGHTS not in case
    aim = Aim(
        graph=graph,
        budget=BUDGET if on_channels else None,
        plan_of=plan_of(graph),
        names=WEIGHTS,
        pattern="unstructured",
        keep=0.25,
        scope="global",
        every=3,
        settled_after=0.7,
    )
    strengths = [
        0.5 if name == "l1_prox" else METHODS[name].strength for name in methods
    ]  # beside others, which set zeros, too
    return policies(methods, strengths if len(methods) > 1 else [], aim)


def plan_of(graph: Graph) -> Callable[..., Plan]:
    return partial(allocation.plan, graph, budget=BUDGET, criterion="magnitude_l2", scope="layer")


def run(kinds: list[MakePolicy], batches: Batches, directory: str | None = None, **changes: Any) -> TrainResult:
    chosen = settings(**{"epochs": 2, "log_every_steps": 1, "checkpoint_every_steps": 4} | changes)
    ranks = {"rank": batches.rank, "world_size": batches.size, "checkpoint_dir": directory, "fingerprint": "sparse"}
    return train(network(), None, batches, chosen, steps_per_epoch=STEPS, policies=kinds, **ranks)


# --- what goes wrong on one rank, or should ---------------------------------------------------------------------------


class AlteredOnRank1(Masked):
    """One bit of one rank's memory flips after three updates."""

    def after_update(self, step: int, lr: float) -> None:
        super().after_update(step, lr)
        if step == 2 and self.training.rank == 1:
            self._masks["0.weight"][0, 0, 0, 0] ^= True
            self._zero_()


class GateAlteredOnRank1(Policy):
    def __init__(self, training: Training, graph: Graph) -> None:
        self.rank = training.rank
        self.gates = channel_gates(training, graph=graph, measure="params", budget=0.5, lr=0.1, settled_after=0.7)

    def shared(self) -> dict[str, Tensor]:
        return {name: alpha + self.rank * 1e-6 for name, alpha in self.gates.shared().items()}


class FailsTheSecondTime:
    """A plan that cannot be made, asked for at the last decision."""

    def __init__(self, graph: Graph) -> None:
        self.plan_of, self.asked = plan_of(graph), 0

    def __call__(self, saliency: dict[str, Tensor]) -> Plan:
        self.asked += 1
        if self.asked > 1:
            raise ValueError(f"no plan on rank {dist.get_rank()}")
        return self.plan_of(saliency)


def by_rank_0(rank: int) -> dict[str, Tensor]:
    assert rank == 0, "only rank 0 decides"
    return {"a": torch.tensor([True, False, True]), "b": torch.ones(2, 5, dtype=torch.bool)}


# --- the two processes ------------------------------------------------------------------------------------------------


def scenario(rank: int, world_size: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    graph = Graph.from_json((Path(folder) / "graph.json").read_text())
    results: dict[str, Any] = {}

    def keep(name: str, kinds: list[MakePolicy], *, dies_at: int | None = None, directory: str = "", **changes: Any):
        seen: dict[str, Any] = {}

        def watched(make: MakePolicy, training: Training) -> Policy:
            policy = make(training)
            seen["parameters"], seen["policy"] = training.parameters, policy
            return policy

        try:
            batches = Batches(rank, world_size, dies_at)
            where = f"{folder}/{directory}" if directory else None
            result = run([partial(watched, make) for make in kinds], batches, where, **changes)
        except (Exception, KeyboardInterrupt) as error:
            results[name] = f"{type(error).__name__}: {error}"
            return
        policy = seen["policy"]
        results[name] = {
            "state": result.state_dict,
            "statistics": result.statistics,
            "history": result.history,
            "from": result.resumed_from,
            "parameters": {key: value.detach().clone() for key, value in seen["parameters"].items()},
            "masks": dict(policy.masks()),
            "shared": {key: value.detach().clone() for key, value in policy.shared().items()},
        }

    for case in CASES:
        keep(case, made(case, graph))
    for case in ("rigl", "hard_concrete"):
        keep(f"{case}, whole", made(case, graph), directory=f"{case}-whole")
        keep(f"{case}, killed", made(case, graph), dies_at=10, directory=f"{case}-cut")
        keep(f"{case}, resumed", made(case, graph), directory=f"{case}-cut")
    training = Training(network(), torch.optim.SGD(network().parameters(), lr=0.1), 4, 1.0, rank, world_size)
    results["agreed"] = agreed(lambda: by_rank_0(rank), training)
    options = {"names": WEIGHTS, "pattern": "unstructured", "scope": "layer", "every": 3, "settled_after": 0.7}
    keep("nothing stays", [partial(RigL, exchange=0.3, keep=1e-6, **options)])
    soft = partial(SoftFilter, graph=graph, plan_of=FailsTheSecondTime(graph), every=4, settled_after=0.4)
    keep("no plan", [soft])
    masks = {name: torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.5
             for name, p in network().named_parameters() if name in WEIGHTS}  # fmt: skip
    keep("altered mask", [partial(AlteredOnRank1, masks=masks)], directory="mask")
    keep("altered gate", [partial(GateAlteredOnRank1, graph=graph)], directory="gate")
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def graph() -> Graph:
    return traced()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def ranks(graph: Graph, folder: Path) -> list[dict[str, Any]]:
    (folder / "graph.json").write_text(graph.to_json())
    mp.spawn(scenario, args=(WORKERS, str(folder)), nprocs=WORKERS)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORKERS)]


# --- one network on all ranks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_ranks_train_one_network_with_the_same_masks_and_gates(ranks: list[dict[str, Any]], case: str):
    first, second = (one[case] for one in ranks)
    assert same_tensors(first["parameters"], second["parameters"])
    assert same_tensors(first["masks"], second["masks"])
    assert same_tensors(first["shared"], second["shared"])
    assert first["shared"] or case in (
        "l1_sign",
        "l0_sign",
        "l1_prox",
        "bn_slimming",
    )  # the last two rest when they have met their aim
    assert without_times(first["history"]) == without_times(second["history"])
    assert (second["state"], second["statistics"]) == ({}, {})


@pytest.mark.parametrize("case", CASES)
def test_two_workers_train_what_one_trains_on_the_same_batches(ranks: list[dict[str, Any]], graph: Graph, case: str):
    alone = run(made(case, graph), Batches())
    found = ranks[0][case]
    for part, expected in (("state", alone.state_dict), ("statistics", alone.statistics)):
        assert found[part].keys() == expected.keys()
        for name in expected:
            difference = (found[part][name] - expected[name]).abs()
            # float32 sums in another order: a few units in the last place of each of 20 steps
            beyond = difference > 1e-6 + 1e-5 * expected[name].abs()
            assert float(beyond.double().mean()) <= (0.03 if case in BY_SIGN else 0), name
            assert float(difference.max()) < 0.01
    for record, same in zip(found["history"], alone.history, strict=True):
        assert record["rows"] == same["rows"] == BATCH
        assert record["loss"] == pytest.approx(same["loss"], rel=1e-5)
        assert record["zeros"] == same["zeros"]


@pytest.mark.parametrize("case", ["rigl", "hard_concrete"])
def test_a_resume_with_the_same_workers_is_bitwise(ranks: list[dict[str, Any]], case: str):
    whole, killed, resumed = (ranks[0][f"{case}, {how}"] for how in ("whole", "killed", "resumed"))
    assert killed.startswith("KeyboardInterrupt")
    assert (whole["from"], resumed["from"]) == (0, 8)
    for part in ("state", "parameters", "statistics", "masks", "shared"):
        assert same_tensors(whole[part], resumed[part])
    assert without_times(whole["history"]) == without_times(resumed["history"])


# --- decisions --------------------------------------------------------------------------------------------------------


def test_rank_0_alone_decides_and_all_hold_what_it_has_decided(ranks: list[dict[str, Any]]):
    for one in ranks:
        assert same_tensors(one["agreed"], by_rank_0(0))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("nothing stays", "ValueError: 0.weight: keep (1e-06) leaves none of the 432 scores"),
        ("no plan", "ValueError: no plan on rank 0"),
    ],
)
def test_an_error_in_a_decision_reaches_every_rank(ranks: list[dict[str, Any]], name: str, error: str):
    assert ranks[0][name].startswith(error)
    assert ranks[0][name] == ranks[1][name]


@pytest.mark.parametrize("what", ["mask", "gate"])
def test_ranks_that_differ_stop_all_of_them_before_a_checkpoint(ranks: list[dict[str, Any]], folder: Path, what: str):
    assert ranks[0][f"altered {what}"].startswith("RanksDiffer: the ranks hold different masks or gates (rank 0: ")
    assert ranks[0][f"altered {what}"] == ranks[1][f"altered {what}"]
    assert not (folder / what).exists()
