"""Training on a Ray cluster: Ray Train starts the workers and replaces dead ones, `training.loop` does the rest.

Checkpoints are our own, in the run directory: a worker group that starts again finds the newest there, whatever died.
Ray's own storage therefore holds nothing that matters; it is a scratch directory, so that no state of an earlier run
is found in it.

The group is elastic (`ScalingConfig(num_workers=(1, n))`): Ray Train counts how many workers the nodes could hold, by their whole
resources, and starts, restarts and resizes the group with so many; each time the loop goes on from the newest checkpoint, with the
same global batches. Its view of the cluster is up to 20 s old. So after the death of a node the first new group may wait for room
that has gone with it; that ends after START_TIMEOUT_S, and the next one is smaller. While it runs, a group is made larger every
RESIZE_EVERY_S at most, for each time costs a start and what was done since the last checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution import context as reports
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from pipeline import artifacts
from pipeline.execution import metrics
from pipeline.execution.machine import COLLECTIVE_TIMEOUT_S, bind_gloo, give_back_memory, keep_freed_memory
from pipeline.execution.pool import is_fatal, nodes_for_workers, worker_resources
from pipeline.models.sharding import Network
from pipeline.training import checkpoint
from pipeline.training.loop import Batches, OnProgress, Record, TrainResult, train
from pipeline.training.policy import MakePolicy
from pipeline.training.settings import TrainSettings

FINAL, STATISTICS, METRICS = "final.safetensors", "statistics.safetensors", "metrics.jsonl"
REPORT_EVERY_S = 2.0  # Ray's controller takes one report per worker every two seconds; more would make training wait
START_TIMEOUT_S = 30  # for resources that nodes seem to have; the start of processes on them, and imports, do not count
START_FAILURES = 30  # worker groups that may not come up, without a checkpoint between them. Ray's default has no end
START_ERRORS = (WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError)
RESIZE_EVERY_S = 60
ENVIRONMENT = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_TIMEOUT_S),
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # its notices would only be logged: checkpoints cover a preemption
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean in a worker what they mean in the driver
}

logger = logging.getLogger(__name__)

MakeBatches = Callable[[int, int], Batches]
"""(rank, number of workers) -> this rank's share of the global batches. Called in the worker; must be picklable."""


class TrainingFailed(RuntimeError):
    """Workers died too often, or could not start. What the newest checkpoint holds stays."""


@dataclass(frozen=True)
class _Job:
    """What every worker needs, sent once through the object store."""

    model: Network
    teacher: Network | None
    make_batches: MakeBatches
    settings: TrainSettings
    policies: Sequence[MakePolicy]
    steps_per_epoch: int
    fingerprint: str
    directory: str
    threads: int
    shard_over: int


def fit(
    model: Network,
    teacher: Network | None,
    make_batches: MakeBatches,
    settings: TrainSettings,
    *,
    steps_per_epoch: int,
    policies: Sequence[MakePolicy] = (),
    fingerprint: str,
    directory: str,
    num_workers: int,
    use_gpu: bool = False,
    threads: int = 1,
    shard_over: int = 1,
    max_failures: int = 3,
    on_progress: OnProgress | None = None,
) -> TrainResult:
    """Train with up to `num_workers` workers on the connected cluster, or go on with what is in `directory`.

    There it leaves step-*.pt (checkpoints), metrics.jsonl (the history, for people and plots) and final.safetensors, whose weights are
    in the result, mapped into memory where the file is a local one.

    Args:
        model, teacher, settings, steps_per_epoch, policies, fingerprint: see `training.loop.train`.
        make_batches: gives each worker its share of the data.
        directory: of this training; local path or URI, shared by all nodes.
        num_workers: each with one GPU (`use_gpu`) and `threads` CPUs, which must be free: close other workers before. Where nodes
            have room for fewer, now or after a death, fewer train, and more again once there is room.
        shard_over: workers that hold one network together, at least; see `holders`.
        max_failures: deaths of workers without a new checkpoint between them before giving up. Errors that would come
            again (bad input, a bug, a loss that is NaN) are raised at once, as themselves.
        on_progress: called in a thread of the driver with the history, about every two seconds while it grows.

    Raises:
        TrainingFailed: too many deaths, or no room for the workers.
        TrainingDiverged, StaleArtifact, and whatever the workers themselves raise.
    """
    directory = artifacts.absolute(directory)
    device = "cuda" if use_gpu else "cpu"
    if num_workers < shard_over:
        raise ValueError(
            f"{shard_over} workers hold a network together, and there are {num_workers}. Raise workers.num_workers or num_streams, or lower "
            "workers.shard_over."
        )
    room = sum(nodes_for_workers(device, threads).values())
    if room < num_workers:
        what = "the nodes have room for %d of %d training workers: it %s"
        begins = room >= shard_over
        logger.warning(what, room, num_workers, "begins with these, and grows" if begins else "waits for nodes")
    job = ray.put(
        _Job(
            model,
            teacher,
            make_batches,
            settings,
            policies,
            steps_per_epoch,
            fingerprint,
            directory,
            threads,
            shard_over,
        )
    )
    resources = worker_resources(device, threads)
    start = partial(_start, job, num_workers, shard_over, use_gpu, resources, fingerprint, directory, max_failures)
    with _environment(), _watched(directory, on_progress):
        while True:
            before = max(checkpoint.steps_in(directory), default=0)
            try:
                answer = start()
                break
            except TrainingFailedError as error:
                # Ray counts them over the whole training, however far it has come; here only those without a checkpoint between them.
                at_start = isinstance(error, ControllerError) and isinstance(error.controller_failure, START_ERRORS)
                if not at_start or max(checkpoint.steps_in(directory), default=0) == before:
                    raise _clear_error(error, directory, num_workers, resources) from error
    weights = artifacts.read_tensors(artifacts.join(directory, FINAL))
    statistics = artifacts.read_tensors(artifacts.join(directory, STATISTICS))
    return TrainResult(weights, answer["history"], answer["resumed_from"], statistics)


def _start(
    job: Any,
    num_workers: int,
    shard_over: int,
    use_gpu: bool,
    resources: dict[str, int],
    fingerprint: str,
    directory: str,
    max_failures: int,
) -> dict[str, Any]:
    """Train to the end with one of Ray's trainers, which keeps nothing that matters. Returns what rank 0 returns."""
    with tempfile.TemporaryDirectory(prefix="ray-train-") as scratch:
        # Type checkers see Train V1 behind `ray.train`; what runs is V2.
        trainer = TorchTrainer(
            _work,  # type: ignore[arg-type]
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=(shard_over, num_workers) if num_workers > shard_over else num_workers,  # type: ignore[arg-type]
                use_gpu=use_gpu,
                resources_per_worker=resources,
                elastic_resize_monitor_interval_s=RESIZE_EVERY_S,  # type: ignore[call-arg]
            ),
            run_config=RunConfig(
                name=artifacts.short(fingerprint) or "training",
                storage_path=scratch,
                failure_config=FailureConfig(
                    max_failures=-1,  # counted by the callback
                    controller_failure_limit=START_FAILURES,  # type: ignore[call-arg]
                ),
                callbacks=[_Failures(directory, max_failures)],  # type: ignore[list-item]
                # Its own lines would bury the progress.
                logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
            ),
            torch_config=_Group(timeout_s=COLLECTIVE_TIMEOUT_S),
        )
        answer: dict[str, Any] = trainer.fit().return_value  # type: ignore[attr-defined]
        return answer


# --- in a worker ------------------------------------------------------------------------------------------------------


def _work(config: dict[str, Any]) -> dict[str, Any]:
    job: _Job = ray.get(config["job"])
    torch.set_num_threads(job.threads)
    keep_freed_memory() if job.shard_over == 1 else give_back_memory()
    reports.logger.setLevel(logging.WARNING)  # a line for each report; this logger alone is not under "ray.train"
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    reporter = _Reporter(job.directory, rank)
    try:
        result = train(
            job.model,
            job.teacher,
            job.make_batches(rank, world_size),
            job.settings,
            steps_per_epoch=job.steps_per_epoch,
            policies=job.policies,
            rank=rank,
            world_size=world_size,
            shard_over=holders(world_size, job.shard_over),
            device=ray.train.torch.get_device(),
            checkpoint_dir=job.directory,
            result_path=artifacts.join(job.directory, FINAL),
            fingerprint=job.fingerprint,
            on_progress=reporter,
        )
    except Exception as error:  # a note survives the way to the driver, a traceback does not
        error.add_note(f"in training worker {rank} of {world_size}:\n{traceback.format_exc()}")
        raise
    if rank == 0:
        reporter.write(result.history)
        artifacts.write_tensors(artifacts.join(job.directory, STATISTICS), result.statistics)
    return {"history": result.history, "resumed_from": result.resumed_from}


def holders(world_size: int, shard_over: int) -> int:
    """How many workers hold one network together: all lines are equally long, and a line has room for it."""
    return next(k for k in range(shard_over, world_size + 1) if world_size % k == 0)


class _Reporter:
    """Progress to Ray Train from all ranks together, as it wants it, and to metrics.jsonl from rank 0."""

    def __init__(self, directory: str, rank: int) -> None:
        self.path, self.rank = artifacts.join(directory, METRICS), rank
        self.write_every_s = 10.0 if artifacts.is_uri(directory) else REPORT_EVERY_S  # a PUT costs time and money
        self.reported = self.written = float("-inf")

    def __call__(self, history: Any) -> None:
        record = history[-1]
        seconds = record["seconds"]  # rank 0's clock on every rank, so all ranks decide alike
        if self.rank == 0 and seconds - self.written >= self.write_every_s:
            self.written = seconds
            try:
                self.write(history)
            except artifacts.StorageError as error:  # for people and plots: not worth the training
                logger.warning("metrics are not written: %s", error)
            metrics.gauge("pruning_training_loss", record["loss"])
            metrics.gauge("pruning_training_rows_per_second", record["rows_per_s"])
            if "zeros" in record:
                metrics.gauge("pruning_training_zero_fraction", record["zeros"])
        if seconds - self.reported >= REPORT_EVERY_S:
            self.reported = seconds
            ray.train.report({name: value for name, value in record.items() if name != "layers"})

    def write(self, history: Any) -> None:
        artifacts.write_bytes(self.path, "".join(json.dumps(record) + "\n" for record in history).encode())


# --- in the controller ------------------------------------------------------------------------------------------------


class _Group(TorchConfig):
    """The process group of Ray Train, over the addresses by which the nodes know each other."""

    @property
    def backend_cls(self) -> type[_GroupBackend]:
        return _GroupBackend


class _GroupBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        try:
            worker_group.execute(bind_gloo)
            super().on_start(worker_group, backend_config)
        except RayActorError:
            # Ray 2.60 forgets a group of which one dies here: the others would wait for it, and keep their place, to the end of the job.
            worker_group.abort()
            raise


class _Failures(UserCallback):
    """Ray Train retries every error of a worker alike, and counts them over the whole run. Here an error that would come again ends
    the run at once, and deaths count only while no new checkpoint comes between them: spot nodes may go as often as they like."""

    def __init__(self, directory: str, max_failures: int) -> None:
        self.directory, self.max_failures = directory, max_failures
        self.step, self.count = -1, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for _, error in sorted(worker_exceptions.items()):
            if is_fatal(error):
                raise error
        step = max(checkpoint.steps_in(self.directory), default=0)
        self.step, self.count = step, self.count + 1 if step == self.step else 1
        if self.count > self.max_failures:
            last = "; ".join(f"rank {rank}: {_first_line(e)}" for rank, e in sorted(worker_exceptions.items()))
            raise TrainingFailed(f"workers failed {self.count} times at step {step}, the last time {last}")


# --- in the driver ----------------------------------------------------------------------------------------------------


def _clear_error(
    error: TrainingFailedError, directory: str, num_workers: int, resources: dict[str, int]
) -> BaseException:
    if isinstance(error, ControllerError) and is_fatal(error.controller_failure):
        return error.controller_failure
    if isinstance(error, ControllerError) and isinstance(error.controller_failure, TrainingFailed):
        what = str(error.controller_failure)
    elif isinstance(error, WorkerGroupError):
        first_lines = {rank: _first_line(e) for rank, e in sorted(error.worker_failures.items())}
        last = "; ".join(f"rank {rank}: {line}" for rank, line in first_lines.items())
        what = f"workers failed too often; the last time {last}"
    else:
        what = (
            f"Ray Train could not run {num_workers} workers with {resources} each; the cluster has "
            f"{ray.available_resources()} free. {_first_line(getattr(error, 'controller_failure', error))}"
        )
    return TrainingFailed(f"{what}. The same command goes on from the newest checkpoint in {directory}.")


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


@contextmanager
def _environment() -> Iterator[None]:
    """Ray Train's settings are environment variables of the driver, and it takes over SIGINT; both are given back."""
    added = [name for name in ENVIRONMENT if name not in os.environ]
    os.environ.update({name: ENVIRONMENT[name] for name in added})
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main_thread else None
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def _watched(directory: str, on_progress: OnProgress | None) -> Iterator[None]:
    """While inside, a thread reads metrics.jsonl and hands on what is new: a file needs no actor and no port."""
    if on_progress is None:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(directory, on_progress, stop), name="training progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _watch(directory: str, on_progress: OnProgress, stop: threading.Event) -> None:
    path = artifacts.join(directory, METRICS)
    seen = read_history(directory)  # of an earlier attempt
    pause_s = 10.0 if artifacts.is_uri(path) else REPORT_EVERY_S / 2
    while True:
        finished = stop.wait(pause_s)
        history = read_history(directory)
        if history != seen:
            seen = history
            on_progress(history)
        if finished:
            return


def read_history(directory: str) -> list[Record]:
    """The records of a training so far, also while it runs; empty before the first."""
    path = artifacts.join(directory, METRICS)
    return [json.loads(line) for line in artifacts.read_bytes(path).splitlines()] if artifacts.exists(path) else []
