"""A run: its directory, what is done in it, its workers, and its networks. Stages (stages.py) are written on top of this."""

from __future__ import annotations

import copy
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import PIL
import timm
import torch
import torchvision
from torch import Tensor, nn

from pipeline import artifacts
from pipeline.artifacts import Manifest, StageRecord
from pipeline.config import RunConfig
from pipeline.data.batches import Decoder
from pipeline.data.rows import Source, open_source
from pipeline.data.units import Units
from pipeline.execution import pool as ray_pool
from pipeline.execution.drive import PassResult, run_pass
from pipeline.execution.ledger import Ledger
from pipeline.execution.pool import RayPool
from pipeline.execution.worker import Pass, cpu_model
from pipeline.models import zoo
from pipeline.models.graph import Graph
from pipeline.models.sharding import Network, Stored, mapped, skeleton_of
from pipeline.models.task import Task
from pipeline.pruning.masks import load_masks
from pipeline.pruning.plan import Plan
from pipeline.pruning.surgery import cut
from pipeline.report.progress import alive, progress
from pipeline.training.loop import Record


@dataclass(frozen=True)
class Input:
    """How an image becomes a tensor in this run."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_fraction: float

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.size, self.mean, self.std, self.interpolation, self.crop_fraction)


class Watcher:
    """Is told how the stages of a run get on. This one pays no heed."""

    def committed(self, run: Run, stage: str, rows: int, seconds: float) -> None:
        """A worker has committed so many rows of a pass over the data, and taken so long."""

    def trained(self, run: Run, stage: str, history: Sequence[Record]) -> None:
        """The history of a training has grown."""

    def ended(self, run: Run, stage: str) -> None:
        """A stage is done."""


class Run:
    """One run directory and the configuration that it is continued with.

    Of several rounds each is a Run of its own, in RUN/rounds/1, RUN/rounds/2 ..., whose dense network is the result of the round before.
    The last one is RUN itself.

    Args:
        config: of the whole run; `self.config` is what this round does of it.
        number: of the round, from 1; None: the last.
    """

    def __init__(self, config: RunConfig, command: str = "", number: int | None = None) -> None:
        self.given = config
        self.command = command
        self.number = config.rounds if number is None else number
        self.config = config.of_round(self.number)
        self.base = Run(config, command, self.number - 1) if self.number > 1 else None
        """The round before."""
        self.part = self.number / config.rounds
        """Of the whole reduction, in powers of the budget: what has been done at the end of this round."""
        self.dir = artifacts.absolute(config.run_dir)
        if self.part < 1:
            self.dir = artifacts.join(self.dir, "rounds", str(self.number))
        self.manifest = Manifest(self.dir)
        self.watcher = Watcher()
        self._pool: RayPool | None = None
        self._networks: dict[str, nn.Module] = {}

    def path(self, *parts: str) -> str:
        return artifacts.join(self.dir, *parts)

    def say(self, text: str) -> None:
        if not self.config.quiet:
            where = f"round {self.number}, " if self.given.rounds > 1 else ""
            print(f"{where}{text}", file=sys.stderr, flush=True)

    # --- rounds -------------------------------------------------------------------------------------------------------

    @property
    def rounds(self) -> list[Run]:
        """From the first to this one."""
        return [*(self.base.rounds if self.base else ()), self]

    @property
    def first(self) -> Run:
        """The round that starts from the dense network: the teacher of all, and what all are compared with."""
        return self.base.first if self.base else self

    @cached_property
    def one_shot(self) -> Run:
        """The first round with the whole budget and all masks: what `sparsify` aims at, and what controls are cut from."""
        if self.base:
            return self.base.one_shot
        if self.part == 1:
            return self
        whole = copy.copy(self)
        whole.config, whole.part = self.given, 1.0
        return whole

    @property
    def stages(self) -> dict[str, StageRecord]:
        """By name; of several rounds "round 1: score"."""
        if self.given.rounds == 1:
            return self.manifest.stages
        every = ((one.label(name), r) for one in self.rounds for name, r in one.manifest.stages.items())
        return dict(every)

    def label(self, stage: str) -> str:
        """The name of a stage of this round among those of all."""
        return stage if self.given.rounds == 1 else f"round {self.number}: {stage}"

    def start_of(self, plan: str) -> Run:
        """Whose network a plan cuts: ours that of this round; a control is cut in one round, whatever ours takes."""
        return self if plan == "ours" else self.one_shot

    # --- stages -------------------------------------------------------------------------------------------------------

    def stage(self, name: str, inputs: Mapping[str, Any], artifact: str, work: Callable[[], None]) -> None:
        """Do `work` unless the manifest says that it is done from these very inputs. Work must be safe to begin again."""
        inputs = json.loads(json.dumps(inputs, default=str))
        if self.manifest.finished(name, inputs):
            self.say(f"{name}: done before")
            return
        if changes := self.manifest.changes(name, inputs):
            self.say(f"{name}: was begun with other values, begins anew ({'; '.join(changes)})")
        started = time.monotonic()
        self.manifest.begin(name, inputs)
        with alive(self.path("alive.json")):
            work()
        self.manifest.finish(name, artifact)
        self.keep_config()
        self.say(f"{name}: {time.monotonic() - started:.1f} s")
        self.watcher.ended(self, name)

    def scratch(self, kind: str, stage: str) -> str:
        """RUN/KIND/STAGE-FINGERPRINT, where a stage leaves what it needs to go on: never mixed with that of other inputs."""
        return self.path(kind, f"{stage}-{artifacts.short(self.manifest.stages[stage].fingerprint)}")

    def keep_config(self) -> None:
        """RUN/config.yaml is what the run was last continued with; a round has none of its own."""
        path = artifacts.join(artifacts.absolute(self.given.run_dir), "config.yaml")
        content = self.given.to_yaml().encode()
        if not artifacts.exists(path) or artifacts.read_bytes(path) != content:
            artifacts.write_bytes(path, content)

    # --- workers --------------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        workers = self.config.workers
        wanted = (workers.num_workers or 1) * workers.threads
        ray_pool.connect(workers.address, num_cpus=max(wanted, _cpus()))

    @cached_property
    def device(self) -> str:
        self.connect()
        return ray_pool.choose_device(self.config.workers.device)

    @cached_property
    def num_workers(self) -> int:
        self.connect()
        return self.config.workers.num_workers or ray_pool.default_num_workers(self.device, self.config.workers.threads)

    @property
    def workers_now(self) -> int:
        """Of a pass over the data: more than at the start where the cluster has grown meanwhile."""
        pool = self._pool
        return pool.num_workers * pool.team_size if isinstance(pool, RayPool) else self.num_workers

    @property
    def pool(self) -> RayPool:
        if self._pool is None:
            self.connect()
            workers = self.config.workers
            self._pool = RayPool(
                max(1, self.num_workers // workers.shard_over),
                self.device,
                workers.threads,
                team_size=workers.shard_over,
                grow=workers.num_workers is None,
            )
        return self._pool

    def release_pool(self) -> None:
        """Free the workers' GPUs and CPUs for somebody else."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def release(self) -> None:
        """The same, and what networks take of the memory. Both come back when they are asked for."""
        self.release_pool()
        self._networks.clear()

    # --- data -----------------------------------------------------------------------------------------------------------

    @cached_property
    def train_rows(self) -> Source:
        return self.base.train_rows if self.base else self._open(self.config.data.train)

    @cached_property
    def val_rows(self) -> Source:
        return self.base.val_rows if self.base else self._open(self.config.data.val)

    def _open(self, path: str) -> Source:
        data = self.config.data
        return open_source(
            path, image_column=data.image_column, label_column=data.label_column, cache_dir=data.cache_dir
        )

    @cached_property
    def input(self) -> Input:
        """From the configuration; what it leaves open is the network's own."""
        if self.base:
            return self.base.input
        own, data = zoo.data_config(self.fresh()), self.config.data
        return Input(
            size=data.image_size,
            mean=data.mean or own["mean"],
            std=data.std or own["std"],
            interpolation=own["interpolation"],
            crop_fraction=data.crop_fraction or own["crop_pct"],
        )

    @cached_property
    def checkpoint_sha256(self) -> str | None:
        """Of the file with the given weights: another one under the same name makes another run."""
        path = self.config.model.checkpoint
        return zoo.checkpoint_sha256(path) if path else None

    @cached_property
    def num_classes(self) -> int:
        return self.base.num_classes if self.base else zoo.num_classes(self.fresh(), self.config.data.image_size)

    # --- networks -------------------------------------------------------------------------------------------------------

    @cached_property
    def _architecture(self) -> nn.Module:
        """The dense network without its weights' story: built once, never given away."""
        if self.base:
            return self.base.network(self.base.result, plan="ours")
        model = self.config.model
        options: dict[str, Any] = dict(model.kwargs)
        torch.manual_seed(self.config.seed)
        return zoo.build(model.name, num_classes=model.num_classes, class_subset=model.classes, **options)

    def fresh(self) -> nn.Module:
        return self._architecture

    def model_inputs(self) -> dict[str, Any]:
        """What the dense network is made from."""
        if self.base:
            model = {"cut_from": self.base.model_inputs()["model"], "plan": self.base.plan("ours").sha256()}
            return {"model": model, "weights": self.base.weights_sha256(self.base.result)}
        return {
            "model": self.config.model.model_dump(mode="json"),
            "checkpoint_sha256": self.checkpoint_sha256,
            "seed": self.config.seed,
        }

    def initial(self) -> nn.Module:
        """The dense network as the configuration, or the round before, gives it, with its weights."""
        if self.base:
            return self.fresh()
        model = self.config.model
        torch.manual_seed(self.config.seed)
        return zoo.build(
            model.name,
            num_classes=model.num_classes,
            pretrained=model.pretrained,
            checkpoint=model.checkpoint,
            class_subset=model.classes,
            **model.kwargs,
        )

    @property
    def parent(self) -> str:
        """Name of the weights that scoring, planning and cutting start from: the dense network, or what `sparsify` has made of it."""
        return "sparse" if self.config.sparsify.epochs else "dense"

    @property
    def result(self) -> str:
        """Name of the weights that the run ends with."""
        return "ours-recovered" if self.config.recover.epochs else "ours-calibrated"

    def save_network(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Keep weights under RUN/networks."""
        artifacts.write_tensors(self.path("networks", f"{name}.safetensors"), state)
        self._networks.pop(name, None)

    def weights_sha256(self, name: str) -> str:
        return artifacts.sha256_of_file(self.path("networks", f"{name}.safetensors"))

    def stored(self, name: str, plan: str | None = None) -> Stored:
        """A network of this run: the dense architecture, cut by a plan if one is named, and the file with the weights kept under `name`."""
        start = self if plan is None else self.start_of(plan)
        model = skeleton_of(start.fresh())
        return Stored(
            model if plan is None else cut(model, self.plan(plan)), self.path("networks", f"{name}.safetensors")
        )

    def network(self, name: str, plan: str | None = None) -> nn.Module:
        """The same with its weights: of a local file they are read when they are looked at, and nobody holds them."""
        if name not in self._networks:
            self._networks[name] = mapped(self.stored(name, plan)).eval()
        return self._networks[name]

    def sent(self, name: str, plan: str | None = None) -> Network:
        """The same as workers get it: whole, or its file where they hold networks together, and each reads its rows."""
        return self.network(name, plan) if self.config.workers.shard_over == 1 else self.stored(name, plan)

    def graph(self) -> Graph:
        return Graph.from_json(artifacts.read_bytes(self.path("graph.json")).decode())

    def plan(self, name: str) -> Plan:
        """`ours` is RUN/plan.json, a control RUN/plans/NAME.json."""
        return Plan.from_json(artifacts.read_bytes(self.plan_path(name)).decode())

    def plan_path(self, name: str) -> str:
        return self.path("plan.json") if name == "ours" else self.path("plans", f"{name}.json")

    def weight_masks(self, name: str) -> dict[str, Tensor]:
        """Masks of single weights of the network that plan `name` leaves, by parameter, shaped like it; empty without a pattern."""
        if self.config.masks.pattern is None:
            return {}
        return load_masks(self.path("weight_masks", f"{name}.safetensors"))

    # --- passes over the data -------------------------------------------------------------------------------------------

    def data_pass(
        self,
        name: str,
        task: Task,
        source: Source,
        units: Units,
        *,
        micro_batch: int,
        title: str,
        stride: int = 1,
        into: str | None = None,
    ) -> PassResult:
        """Distribute `task` over `units` (every `stride`-th) with exact sums, in stage `name`; goes on from that stage's commits. The sums
        are in the result, or in the file `into`."""
        config = self.config
        ledger = Ledger(self.scratch("units", name), len(units), self.manifest.stages[name].fingerprint)
        work = Pass(
            task=task,
            source=source,
            units=units,
            decoder=self.input.decoder,
            ledger=ledger,
            grid=None,
            micro_batch=micro_batch,
            num_classes=self.num_classes,
            on_bad_row=config.data.on_bad_row,
            decode_threads=config.workers.decode_threads,
        )
        rows_per_unit = units.num_rows / len(units)
        with progress(title, total=-(-units.num_rows // stride), unit="rows", quiet=config.quiet) as bar:
            return run_pass(
                work,
                self.pool,
                commit_interval_s=config.workers.commit_interval_s,
                max_failures=config.workers.max_failures,
                max_bad_fraction=config.data.max_bad_fraction,
                stride=stride,
                into=into,
                on_progress=lambda rows: bar.update(rows),
                on_lease=lambda units, seconds: self.watcher.committed(
                    self, name, round(units * rows_per_unit), seconds * config.workers.shard_over
                ),
                on_warning=self.say,
            )

    def rows_per_unit(self, micro_batch: int) -> int:
        """Of a pass whose units need not be small: one micro-batch, or several where the members of a team share them."""
        return micro_batch * (8 if self.config.workers.shard_over > 1 else 1)

    def pass_inputs(self, source: Source, units: Units, micro_batch: int, **more: Any) -> dict[str, Any]:
        """What the bits of a pass depend on; the number of workers is not among it."""
        # Gathered weights lie in memory in their own order, and where an image is one pixel a kernel may then round in another.
        in_rows = {"networks": "in rows"} if self.config.workers.shard_over > 1 else {}
        return {
            **in_rows,
            "rows": source.fingerprint,
            "units": units.describe(),
            "micro_batch": micro_batch,
            "input": vars(self.input),
            "device": self.device,
            "threads": self.config.workers.threads,
            "versions": versions(),
            **more,
        }


def versions() -> dict[str, str]:
    """Of the libraries whose numbers end up in the sums."""
    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "pillow": PIL.__version__,
    }


def environment(run: Run) -> dict[str, Any]:
    """What the run was started with: machine, versions, workers, command."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": cpu_model(),
        "cpus": _cpus(),
        "device": run.device,
        "workers": run.num_workers,
        "threads_per_worker": run.config.workers.threads,
        **versions(),
        "ray": ray_pool.ray.__version__,
        "command": run.command,
    }


def _cpus() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
