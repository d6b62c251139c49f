"""The gradient of one global batch, computed by one rank or shared by many."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.models.sharding import Network, Sharded, build_mesh, explained, whole
from pipeline.training.distillation import student_loss
from pipeline.training.settings import TrainSettings


class Learner:
    """A copy of the model in training on this rank, with its teacher: gradients, but no optimizer and no files.

    `model` has what is trained on this rank: the network, or in a sharded training its rows.
    """

    def __init__(
        self,
        model: Network,
        teacher: Network | None,
        settings: TrainSettings,
        world_size: int,
        device: torch.device,
        shard_over: int = 1,
    ) -> None:
        if settings.distill_weight > 0 and teacher is None:
            raise ValueError(
                f"distill_weight is {settings.distill_weight}, but no teacher is given. Give one, or set it to 0."
            )
        self.settings, self.world_size, self.device = settings, world_size, device
        self.format = settings.memory_format
        if settings.distill_weight == 0:
            teacher = None
        self.model: nn.Module
        self.teacher: nn.Module | None = None
        self.sharded: Sharded | None = None
        self._replica: nn.Module | None = None
        mesh = build_mesh(shard_over, world_size, device)
        if mesh is None:
            self.model = self._held(model).train()
            self.teacher = None if teacher is None else self._held(teacher).eval()
            return
        self.sharded = Sharded(model, mesh, device)
        self.model = self.sharded.rows.train()
        self._replica = self.sharded.replica.train()
        if teacher is not None:
            self.teacher = Sharded(teacher, mesh, device, trains=False).replica.eval()

    def _held(self, network: Network) -> nn.Module:
        return whole(network).to(self.device).to(memory_format=self.format)

    def to_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        return (images.contiguous(memory_format=self.format) if images.ndim == 4 else images), labels

    def backward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Set the gradients of the mean loss over the global batch, the same on every rank.

        Args:
            images: this rank's share [n, ...]; n may differ between ranks and be 0.
            labels: int64 [n] or float [n, C].

        Returns:
            float64 [2] on the device: this rank's summed loss, and n.
        """
        replica = self._wrap(images, labels) if self._replica is None else self._replica
        rows = torch.tensor(float(len(images)), device=self.device, dtype=torch.float64)
        global_rows = rows.clone()
        if self.world_size > 1:
            dist.all_reduce(global_rows)
        global_rows.clamp_(min=1)  # a step whose rows were all bad has a gradient of zero, not of NaN
        # DDP and FSDP average over the ranks. A rank's mean must count by its rows, not by its being one of the ranks.
        share = rows * self.world_size / global_rows
        if self.sharded is None:
            loss = self._loss(replica, images, labels)
            (loss * share.to(loss.dtype)).backward()
        else:
            self.sharded.send_buffers_()
            with explained():
                loss = self._loss(replica, images, labels)
                (loss * share.to(loss.dtype)).backward()
            self.sharded.take_gradients_()
        return torch.stack([loss.detach().double() * rows, rows])

    def _loss(self, replica: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Mean over this rank's rows. Without rows a zero, which joins every collective and touches no statistics."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.uses_bf16(self.device)):
            if len(images) == 0:
                row = images.new_zeros(1, *images.shape[1:])
                logits = replica.eval()(row)
                replica.train()
                if self.sharded is not None and self.teacher is not None:
                    with torch.no_grad():
                        self.teacher(row)  # its weights are gathered by all ranks
                return logits.float().sum() * 0
            logits = replica(images)
            with torch.no_grad():
                teacher_logits = None if self.teacher is None else self.teacher(images)
        return student_loss(
            logits,
            labels,
            teacher_logits,
            smoothing=self.settings.label_smoothing,
            weight=self.settings.distill_weight,
            temperature=self.settings.distill_temperature,
        )

    def _wrap(self, images: Tensor, labels: Tensor) -> nn.Module:
        """DDP for several workers, with its gradient buckets settled before the first step that counts.

        By its default DDP sends rank 0's buffers to all before each forward: the batch-norm statistics are rank 0's.

        DDP orders its buckets anew after the first backward. A sum over three or more ranks rounds by the place of an
        element in its bucket, so a resumed run, whose first step is another one, would differ in the last bits. Hence
        one backward on the first batch whose gradients, statistics and random numbers are thrown away.
        """
        if self.world_size == 1:
            self._replica = self.model
            return self.model
        self._replica = replica = DistributedDataParallel(
            self.model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        random_state = self.random_state()
        self._loss(replica, images, labels).backward()
        self.model.zero_grad(set_to_none=True)
        self.set_random_state(random_state)
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        return replica

    def clip_grad_norm_(self, max_norm: float) -> None:
        if self.sharded is not None:
            self.sharded.clip_grad_norm_(max_norm)
        else:
            nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def nonfinite_parameter(self) -> str | None:
        """Name of the first parameter with NaN or Inf; the same on every rank."""
        if self.sharded is not None:
            return self.sharded.nonfinite_parameter()
        finite = torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()])
        if bool(finite.all()):
            return None
        return next(n for (n, _), ok in zip(self.model.named_parameters(), finite.tolist(), strict=True) if not ok)

    def random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def set_random_state(self, state: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)


def mixed_seed(*parts: int) -> int:
    """One well mixed seed from several numbers, so that neighbouring ranks and steps share no stream."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
