"""Training on one or many workers: the same steps for any number of them, and resumable after any of them.

A step is one global batch. Each rank computes its share, and the shares may be unequal: every rank scales its loss so
that the averaged gradient is that of the mean over the global batch. Batch-norm statistics are those of rank 0,
broadcast before each forward; exact ones over all rows come from `training.calibrate`.

Each rank holds the whole network (DDP), or `shard_over` of them hold one together (FSDP2, `models.sharding`): the same steps, checkpoints
that the other can go on from, and sums that round differently.

With the same number of workers, a resumed run equals the undisturbed one bit for bit: on CPUs with the same number of
threads, on GPUs if the caller also asks for deterministic kernels (`torch.use_deterministic_algorithms`). With another
number it goes on from the same step with the same global batches; sums then round differently, and dropout draws anew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import artifacts
from pipeline.models.sharding import Network, together, write_result
from pipeline.training import checkpoint
from pipeline.training.policy import MakePolicy, Policies, Training, require_agreement, require_zeros, shares_of_zeros
from pipeline.training.rows import on_rows, require_rows, shares_in_rows
from pipeline.training.schedule import build_ema, build_optimizer, build_schedule, sum_of_rates
from pipeline.training.settings import TrainSettings
from pipeline.training.step import Learner, mixed_seed

Record = dict[str, Any]
"""One line of the history: step, epoch, loss (mean since the last line), lr, rows, seconds (of training so far,
restarts included), rows_per_s. With policies also what they say of themselves, "zeros" (share of the weights that are zero or masked)
and, in the newest line alone, "layers": weight -> [share of zeros, share of zeros and near zeros]."""

OnProgress = Callable[[Sequence[Record]], None]
"""Called with the history so far, whose last record is new."""


class Batches(Protocol):
    """This rank's share of the global batches of one epoch, from `start_step` on.

    Yields images [n, ...] and labels (int64 [n] or float [n, C]); n may differ between ranks and be 0. What a global
    batch holds must depend on (epoch, step) alone, augmentation included.
    """

    def __call__(self, epoch: int, start_step: int, /) -> Iterable[tuple[Tensor, Tensor]]: ...


class TrainingDiverged(ArithmeticError):
    """The loss or the weights are no longer finite. Running the same again gives the same."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves."""

    state_dict: dict[str, Tensor]
    """On the CPU: the averaged weights if ema_decay > 0, else the last. On rank 0; empty on the others, and if they went to a file."""
    history: list[Record]
    resumed_from: int
    """Step of the checkpoint that this call went on from; 0 for a fresh start."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """What policies have counted, by "kind/name", on the CPU. On rank 0; empty on the others."""


def train(
    model: Network,
    teacher: Network | None,
    batches: Batches,
    settings: TrainSettings,
    *,
    steps_per_epoch: int,
    policies: Sequence[MakePolicy] = (),
    rank: int = 0,
    world_size: int = 1,
    shard_over: int = 1,
    device: torch.device | None = None,
    checkpoint_dir: str | None = None,
    result_path: str | None = None,
    fingerprint: str = "",
    on_progress: OnProgress | None = None,
) -> TrainResult:
    """Train a copy of `model`, from the newest checkpoint in `checkpoint_dir` if there is one.

    Args:
        model: is not changed. A `Stored` one is read from its file, in a sharded training by each rank its own rows.
        teacher: followed with weight settings.distill_weight, in eval mode and without gradients; is not changed.
        batches: this rank's share of each global batch.
        steps_per_epoch: the same on every rank; `batches` must yield exactly so many.
        policies: penalties, gates and masks, see `training.policy`.
        rank, world_size: above 1 worker the process group (gloo or nccl) exists already.
        shard_over: ranks that hold one network together, of policies with `Masked` at most; 1: each holds its own. Batches and
            results are the same.
        device: CPU by default. Threads are the caller's choice (`torch.set_num_threads`).
        checkpoint_dir: local path or URI that every rank can read; rank 0 writes. None: no checkpoints.
        result_path: safetensors file for the final weights, local path or URI, written tensor by tensor instead of being returned;
            the fingerprint is in its metadata.
        fingerprint: of everything that the run is made from besides the settings: model, plan, data, policies.
        on_progress: called at the same steps on every rank, with the same values.

    Raises:
        TrainingDiverged: the loss is not finite; names the step. Nothing after that step is stored.
        StaleArtifact: checkpoint_dir holds a checkpoint of something else.
    """
    device = device or torch.device("cpu")
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        torch.cuda.set_device(device)  # nccl's object collectives use the current one
    require_rows(policies, shard_over)
    learner = Learner(model, teacher, settings, world_size, device, shard_over)
    identity = {"fingerprint": fingerprint, "steps_per_epoch": steps_per_epoch, "settings": settings.identity()}
    # The caller's random numbers go on as if nothing had been drawn here.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(mixed_seed(settings.seed, rank, 0))
        run = _Run(learner, settings, steps_per_epoch, policies, rank, checkpoint_dir, identity)
        run.resume()
        for images, labels in run.remaining(batches):
            run.update(images, labels)
            if run.at_record():
                run.record()
                if on_progress is not None:
                    on_progress(run.history)
            if run.at_checkpoint():
                run.save()
        statistics = run.policy.statistics() if rank == 0 else {}
        return TrainResult(run.final_state(result_path), run.history, run.resumed_from, statistics)


class _Run:
    """Everything that changes while training, on one rank."""

    def __init__(
        self,
        learner: Learner,
        settings: TrainSettings,
        steps_per_epoch: int,
        policies: Sequence[MakePolicy],
        rank: int,
        checkpoint_dir: str | None,
        identity: dict[str, Any],
    ) -> None:
        if steps_per_epoch < 1:
            raise ValueError(
                f"steps_per_epoch is {steps_per_epoch}: there are fewer rows than one batch. Lower batch_size."
            )
        self.learner, self.settings, self.rank, self.world_size = learner, settings, rank, learner.world_size
        self.steps_per_epoch, self.num_steps = steps_per_epoch, settings.epochs * steps_per_epoch
        self.checkpoint_dir, self.identity = checkpoint_dir, identity
        self.optimizer = build_optimizer(learner.model, settings)
        whole = self.num_steps if settings.rewind_epochs is None else round(settings.rewind_epochs * steps_per_epoch)
        self.first_of_schedule = whole - self.num_steps
        self.schedule = build_schedule(
            self.optimizer,
            lr=settings.lr,
            min_lr=settings.min_lr,
            num_steps=whole,
            warmup_steps=round(settings.warmup_epochs * steps_per_epoch),
        )
        lr_sum = sum_of_rates(self.schedule, range(self.first_of_schedule, whole))
        training = Training(
            learner.model, self.optimizer, self.num_steps, lr_sum, rank, learner.world_size, settings.seed
        )
        if learner.sharded is not None:
            policies = on_rows(policies, learner.sharded)
        self.policy = Policies([make(training) for make in policies])
        # Only rank 0 averages what it has whole: it is the one that writes, and the batch-norm statistics are its own.
        averages = settings.ema_decay > 0 and (rank == 0 or learner.sharded is not None)
        self.ema = build_ema(learner.model, settings.ema_decay) if averages else None
        self.step = 0
        self.resumed_from = 0
        self.history: list[Record] = []
        self.pending: list[Tensor] = []  # one per step since the last record: this rank's summed loss, and its rows
        self.seconds_before = 0.0
        self.started = time.perf_counter()

    # --- one step -----------------------------------------------------------------------------------------------------

    def remaining(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's shares of the steps that are still to do, on its device."""
        while self.step < self.num_steps:
            epoch, start_step = divmod(self.step, self.steps_per_epoch)
            source = iter(batches(epoch, start_step))
            for step in range(start_step, self.steps_per_epoch):
                batch = next(source, None)
                if batch is None:
                    raise self._miscounted(epoch, f"only {step}")
                yield self.learner.to_device(*batch)
            if next(source, None) is not None:  # lets a generator come to its own end, too
                raise self._miscounted(epoch, "more")

    def _miscounted(self, epoch: int, given: str) -> ValueError:
        return ValueError(
            f"epoch {epoch} has {self.steps_per_epoch} steps, the batches of rank {self.rank} give {given}. "
            "Every rank must have a share of every step, if need be an empty one."
        )

    def update(self, images: Tensor, labels: Tensor) -> None:
        """One step of the optimizer on this rank's share of the global batch."""
        self.schedule.step_update(self.first_of_schedule + self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.before_forward(self.step)
        self.pending.append(self.learner.backward(images, labels))
        self.policy.after_backward(self.step)
        if self.settings.clip_grad_norm is not None:
            self.learner.clip_grad_norm_(self.settings.clip_grad_norm)
        self.optimizer.step()
        self.policy.after_update(self.step, self._lr())
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.learner.model, step=self.step)

    # --- records ------------------------------------------------------------------------------------------------------

    def at_record(self) -> bool:
        """By the step alone: all ranks agree, and a resumed run has the records of an undisturbed one."""
        at_end_of_epoch = self.step % self.steps_per_epoch == 0
        return at_end_of_epoch or self.step % self.settings.log_every_steps == 0 or self.at_checkpoint()

    def record(self) -> None:
        """Sum the pending losses over the ranks and append a line to the history. Raises TrainingDiverged."""
        now = self.seconds_before + time.perf_counter() - self.started if self.rank == 0 else 0.0
        clock = torch.tensor([[now, 0.0]], dtype=torch.float64, device=self.learner.device)
        sums = torch.cat([*(pair[None] for pair in self.pending), clock])
        self.pending.clear()
        if self.world_size > 1:
            dist.all_reduce(sums)
        *steps, (seconds, _) = sums.tolist()
        for step, (loss, _) in enumerate(steps, start=self.step - len(steps)):
            if not math.isfinite(loss):
                raise self._diverged(f"loss is {loss}", step)
        rows = sum(count for _, count in steps)
        before = self.history[-1]["seconds"] if self.history else 0.0
        if self.history:  # of a deep network they would outgrow all else in metrics.jsonl and in checkpoints
            self.history[-1].pop("layers", None)
        record = {
            "step": self.step,
            "epoch": (self.step - 1) // self.steps_per_epoch,
            "loss": sum(loss for loss, _ in steps) / max(rows, 1),
            "lr": self._lr(),
            "rows": int(rows),
            "seconds": seconds,
            "rows_per_s": rows / max(seconds - before, 1e-9),
        }
        self.history.append(record | self._sparsity())

    def _sparsity(self) -> Record:
        if not self.policy.parts:
            return {}
        masks, sharded = self.policy.masks(), self.learner.sharded
        if sharded is not None:
            (zeros, _), layers = shares_in_rows(sharded, masks)
        else:
            (zeros, _), layers = shares_of_zeros(dict(self.learner.model.named_parameters()), masks)
        return {**self.policy.figures(), "zeros": zeros, "layers": layers}

    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _check_finite(self) -> None:
        """A loss may be finite one step before its weights are not; those must not be what a rerun starts from."""
        name = self.learner.nonfinite_parameter()
        if name is not None:
            raise self._diverged(f"the update made {name} NaN or Inf", self.step - 1)

    def _diverged(self, what: str, step: int) -> TrainingDiverged:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        self.schedule.step_update(self.first_of_schedule + step)
        return TrainingDiverged(
            f"{what} at step {step} (epoch {epoch}, step {step_in_epoch} of {self.steps_per_epoch}), lr {self._lr():g}."
            f" Lower lr (now {self.settings.lr:g}), lengthen warmup_epochs (now {self.settings.warmup_epochs:g}), set "
            f"clip_grad_norm (now {self.settings.clip_grad_norm}) or turn amp off (now {self.settings.amp}), in a new "
            "directory."
        )

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def at_checkpoint(self) -> bool:
        if self.checkpoint_dir is None:
            return False
        return self.step % self.settings.checkpoint_every_steps == 0 or self.step == self.num_steps

    def save(self) -> None:
        """All ranks take part: each gives its random state, and its rows if it has no more; rank 0 writes the rest."""
        assert self.checkpoint_dir is not None
        sharded = self.learner.sharded
        self._check_finite()
        self._together(self.policy.require_zeros)
        require_agreement(self.policy.shared(), self.rank, self.world_size)
        random_states: list[Any] = [self.learner.random_state()]
        if self.world_size > 1:
            random_states = [None] * self.world_size
            dist.all_gather_object(random_states, self.learner.random_state())
        if self.rank != 0 and sharded is None:
            return
        epoch, start_step = divmod(self.step, self.steps_per_epoch)
        state = {
            "identity": self.identity,
            "step": self.step,
            "sampler": {"epoch": epoch, "start_step": start_step},
            "model": self.learner.model.state_dict(),
            "policy": self.policy.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random_states": random_states,
            "history": self.history,
        }
        if sharded is None:
            checkpoint.save(self.checkpoint_dir, state)
        else:
            spread = sharded.spread_state(state, self._names())
            checkpoint.save_sharded(self.checkpoint_dir, spread, self.rank, self.world_size)

    def _names(self) -> list[str]:
        """Of the parameters by their numbers in the optimizer's state."""
        names = {id(parameter): name for name, parameter in self.learner.model.named_parameters()}
        return [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group["params"]]

    def _together(self, work: Callable[[], Any]) -> Any:
        """In a sharded training an error of one rank is raised on all."""
        return work() if self.learner.sharded is None else together(work, self.world_size)

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        state = None if self.checkpoint_dir is None else self._agreed_state(self.checkpoint_dir)
        if state is None:
            return
        if self.learner.sharded is not None:
            state = self.learner.sharded.take_state(state, self._names())
        self.step = self.resumed_from = state["step"]
        self.learner.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.history = state["history"]
        self.seconds_before = self.history[-1]["seconds"]
        if len(state["random_states"]) == self.world_size:
            self.learner.set_random_state(state["random_states"][self.rank])
        else:
            torch.manual_seed(mixed_seed(self.settings.seed, self.rank, self.step))

    def _agreed_state(self, directory: str) -> dict[str, Any] | None:
        """Rank 0 chooses: all ranks go on from the same checkpoint, or raise the same error instead of waiting."""
        place = None if self.learner.sharded is None else self.learner.sharded.empty
        state: dict[str, Any] | None = None
        message: list[Any] = [None, None]  # path, error
        if self.rank == 0:
            try:
                found = checkpoint.newest(directory, self.identity, place)
                message[0], state = found or (None, None)
            except (ValueError, OSError) as error:
                message[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(message, src=0, device=self.learner.device)
        path, failure = message
        if failure is not None:
            raise failure
        if path is None:
            return None
        return self._together(lambda: state if self.rank == 0 else checkpoint.load(path, place))

    def final_state(self, path: str | None) -> dict[str, Tensor]:
        """The result, which goes to `path` if there is one."""
        self._check_finite()
        sharded = self.learner.sharded
        if self.rank != 0 and sharded is None:
            return {}
        source = self.learner.model if self.ema is None else self.ema.module
        self.policy.settle_(source)
        self._together(lambda: require_zeros(dict(source.named_parameters()), self.policy.masks()))
        metadata = {"fingerprint": str(self.identity["fingerprint"])}
        if sharded is not None:
            if path is not None:
                self._together(lambda: write_result(path, sharded, source, metadata, self.rank))
                return {}
            state = {name: tensor for name, tensor in sharded.state_of(source) if self.rank == 0}
        else:
            state = source.state_dict()
            if path is not None:
                artifacts.write_parts(path, artifacts.tensor_parts(state, metadata))
                return {}
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
