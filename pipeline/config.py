"""RunConfig: everything a run depends on, one frozen model per stage, a docstring under each field; YAML in and out.

Configuration stops at the stage: functions that compute take plain arguments. What decides the result (rows, criterion, budget)
is kept apart from what only decides the speed (`workers`): the same run on one worker and on sixty-four has one fingerprint.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator


class ConfigError(ValueError):
    """What a user wrote does not fit; each line names the field, the value and the way out."""


class Section(BaseModel):
    """One part of the configuration: frozen, closed to unknown keys, its field docstrings are the help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_names(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else _as_tuple(value)


def _as_floats(value: Any) -> Any:
    return (value,) if isinstance(value, int | float) else _as_tuple(value)


def _as_pattern(value: Any) -> Any:
    if isinstance(value, int):
        raise ValueError(f'{value} is what YAML makes of a pattern like 2:4. Write it in quotes: pattern: "2:4"')
    return value


IntTuple = Annotated[tuple[int, ...], BeforeValidator(_as_tuple)]
Floats = Annotated[tuple[float, ...], BeforeValidator(_as_floats)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_names), Field(min_length=1)]
Methods = Annotated[tuple[str, ...], BeforeValidator(_as_names)]
Controls = Annotated[tuple[Literal["random", "magnitude"], ...], BeforeValidator(_as_names)]
Pattern = Annotated[str | None, BeforeValidator(_as_pattern)]
Kinds = Annotated[tuple[Literal["weights", "inputs", "curvature"], ...], BeforeValidator(_as_names)]


class ModelConfig(Section):
    """The dense network to start from."""

    name: str = "resnet152.tv2_in1k"
    """timm name, or `package.module:factory` of your own."""
    pretrained: bool = True
    """Take timm's weights from the Hub. Off: random weights, or `checkpoint`."""
    checkpoint: str | None = None
    """safetensors or torch file with the weights (loaded with weights_only=True), `pkg:PACKAGE/FILE` in an installed package, or a directory of
    torch.distributed.checkpoint (whose index is a pickle: from where you trust)."""
    num_classes: int | None = Field(default=None, ge=2)
    """Outputs of the network; empty: the factory's own."""
    classes: IntTuple | None = None
    """Keep these rows of the classifier, in the order of the data's labels: an ImageNet network for a subset of its classes."""
    kwargs: dict[str, int | float | bool | str] = Field(default_factory=dict)
    """Further arguments of the factory."""


class DataConfig(Section):
    """Where the rows are and how an image becomes a tensor."""

    train: str = ""
    """Rows for scoring and recovery: Parquet (file, directory, glob, s3://, gs://), image folder, or hf:OWNER/NAME[:SPLIT]."""
    val: str = ""
    """Rows for evaluation, the same forms."""
    image_column: str = "image"
    """Column with the encoded image: binary, or Hugging Face's struct<bytes, path>."""
    label_column: str = "label"
    """Column with the integer label."""
    image_size: int = Field(default=224, ge=8)
    """Height and width in pixels that the network sees."""
    crop_fraction: float | None = Field(default=None, gt=0, le=1)
    """Evaluation crop: the shorter side is resized to image_size / crop_fraction. Empty: the network's own."""
    mean: tuple[float, float, float] | None = None
    """Per-channel mean of the input in 0..1. Empty: the network's own."""
    std: tuple[float, float, float] | None = None
    """Per-channel standard deviation. Empty: the network's own."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """A corrupt image or label: `stop` names it and ends the run, `skip` counts it and lists it in the report."""
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)
    """With `skip`: more bad rows than this fraction end the run all the same."""
    cache_dir: str = "~/.cache/gradient-pruning-pipeline"
    """Where rows from the Hub are kept as Parquet."""


class TrainingConfig(Section):
    """Distributed training, used before pruning (`train`) and after it (`recover`)."""

    epochs: int = Field(default=0, ge=0)
    """Passes over data.train; 0 leaves the stage out."""
    batch_size: int = Field(default=256, ge=1)
    """Rows in one step, over all workers."""
    num_streams: int = Field(default=8, ge=1)
    """Fixed number of streams that the epoch's order is dealt to; the largest possible number of training workers."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD has Nesterov momentum."""
    lr: float = Field(default=0.1, gt=0)
    """Peak learning rate at this batch_size."""
    min_lr: float = Field(default=1e-5, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = Field(default=0.5, ge=0)
    """Linear warm-up."""
    rewind_epochs: float | None = Field(default=None, gt=0)
    """Learning-rate rewinding (Renda et al., ICLR 2020): length of the schedule that the network was trained with, of which `epochs` are the
    last; `lr`, `min_lr` and `warmup_epochs` are that schedule's. Empty: a schedule of its own."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD, beta1 of AdamW."""
    weight_decay: float = Field(default=2e-5, ge=0)
    """Not applied to norms and biases."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Share of the label given to all classes alike."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay per step of the averaged weights, which are the result; 0 takes the last weights themselves."""
    distill_weight: float = Field(default=0.0, ge=0, le=1)
    """Share of the loss that follows the dense network's logits."""
    distill_temperature: float = Field(default=2.0, gt=0)
    """Softens both sets of logits."""
    clip_grad_norm: float | None = Field(default=None, gt=0)
    """Largest global norm of a gradient."""
    crop_scale: tuple[float, float] = (0.35, 1.0)
    """Area of the random resized crop."""
    auto_augment: str | None = None
    """timm's policy string, for example rand-m9-mstd0.5-inc1."""
    random_erase: float = Field(default=0.0, ge=0, le=1)
    """Probability of random erasing."""
    amp: Literal["auto", "bf16", "off"] = "auto"
    """Mixed precision; `auto` is bf16 on a GPU and off on a CPU."""
    checkpoint_every_steps: int = Field(default=500, ge=1)
    """Steps between two checkpoints: what a death can cost."""
    loader_processes: int = Field(default=0, ge=0)
    """Processes per worker that decode and augment; 0 does it in the worker itself (best when a worker has one core)."""

    @model_validator(mode="after")
    def _fits(self) -> TrainingConfig:
        if self.batch_size % self.num_streams:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of num_streams ({self.num_streams}), so that each stream gives "
                "the same number of rows to a step. Change one of the two."
            )
        if self.epochs and self.warmup_epochs >= (self.rewind_epochs or self.epochs):
            raise ValueError(
                f"warmup_epochs ({self.warmup_epochs}) must be less than epochs ({self.epochs}): the cosine comes after the warm-up. "
                "Lower warmup_epochs or train longer."
            )
        if self.rewind_epochs is not None and self.rewind_epochs < self.epochs + self.warmup_epochs:
            raise ValueError(
                f"rewind_epochs ({self.rewind_epochs}) must be at least epochs ({self.epochs}) and warmup_epochs ({self.warmup_epochs}) together: "
                "these epochs are the end of that schedule. Raise it, or leave it out."
            )
        if self.min_lr > self.lr:
            raise ValueError(
                f"min_lr ({self.min_lr}) must not exceed lr ({self.lr}), the peak. Lower min_lr or raise lr."
            )
        return self


class SparsifyConfig(TrainingConfig):
    """Training that drives channels or weights towards zero before they are pruned, or masks weights while it trains."""

    method: Methods = ()
    """Names in training.policies.METHODS; several act together. Empty: none, and no such training."""
    strength: Floats = ()
    """Of each method's penalty, in the order of `method`; 1 takes as much as the average weight has, over the whole training and where the
    loss is not in its way. Empty: the method's own default."""
    update_every_steps: int = Field(default=20, ge=1)
    """Steps between two decisions of a mask that changes, or between two rises of a penalty that grows."""
    settled_after: float = Field(default=0.75, gt=0, le=1)
    """Share of the training after which masks stay as they are, targets are reached, and penalties no longer grow."""
    exchange: float = Field(default=0.3, gt=0, lt=1)
    """`rigl`: fraction of a layer's weights that the first decision drops and grows; falls to 0 along a cosine."""
    gate_lr: float = Field(default=0.1, gt=0)
    """`hard_concrete`: learning rate of the gates (Adam)."""

    @model_validator(mode="after")
    def _has_method(self) -> SparsifyConfig:
        if bool(self.epochs) != bool(self.method):
            raise ValueError(
                f"epochs ({self.epochs}) and method ({', '.join(self.method) or 'none'}) go together. Give both, or neither."
            )
        if self.strength and len(self.strength) != len(self.method):
            raise ValueError(
                f"strength {list(self.strength)} does not fit method {list(self.method)}: give one number for each, or none at all."
            )
        return self


class ScoreConfig(Section):
    """The saliency pass."""

    criterion: Names = ("taylor",)
    """Name in saliency.criteria.CRITERIA; of several the ranks are fused."""
    criterion_weights: Floats = ()
    """Weight of each criterion in the fused rank; empty: all alike."""
    statistics: Kinds = ()
    """Kept beside the channel gates and what the criteria need, for criteria that are chosen later: `weights` (gradients of each weight),
    `inputs` (moments of what each layer reads), `curvature` (a second pass with Hessian products)."""
    stop_when_stable: float | None = Field(default=None, gt=0, lt=1)
    """End the pass when the last doubling of the rows exchanged at most this fraction of the removed channels; empty: all rows."""
    num_rows: int | None = Field(default=None, ge=1)
    """Rows of data.train to score, spread evenly; empty: all."""
    rows_per_unit: int = Field(default=64, ge=1)
    """Rows in one unit of work; never derived from the number of workers."""
    micro_batch: int = Field(default=32, ge=1)
    """Rows in one forward and backward."""
    seed: int = 0
    """Seed of the `random` criterion."""

    @model_validator(mode="after")
    def _fits(self) -> ScoreConfig:
        if self.micro_batch > self.rows_per_unit:
            raise ValueError(
                f"micro_batch ({self.micro_batch}) must not exceed rows_per_unit ({self.rows_per_unit}). Raise rows_per_unit or lower micro_batch."
            )
        return self


class BudgetConfig(Section):
    """What must remain."""

    params: float | None = None
    """Fraction of the parameters that remains, between 0 and 1; with `masks.pattern` and no `masks.keep`, of those that are not zero."""
    macs: float | None = None
    """Fraction of the multiply-accumulates that remains, between 0 and 1."""
    scope: Literal["auto", "global", "flat", "layer", "isomorphic"] = "auto"
    """How groups compete: all together by saliency per cost, or by saliency alone (`flat`), each alike, or those of one shape; `auto` is
    the criterion's own."""
    min_keep: float = Field(default=0.1, gt=0, lt=1)
    """Least fraction of each group that stays."""
    round_to: int = Field(default=8, ge=1)
    """Kept channels are a multiple of this in groups larger than 32."""
    max_blocks: float = Field(default=0.0, ge=0, le=1)
    """Largest fraction of the residual blocks that may be removed whole, as far as they can be (trial cuts decide); 0: none, and none is
    looked for."""

    @property
    def given(self) -> bool:
        """Whether anything is to be cut."""
        return self.params is not None or self.macs is not None

    @model_validator(mode="after")
    def _one(self) -> BudgetConfig:
        named = {"params": self.params, "macs": self.macs}
        given = {name: value for name, value in named.items() if value is not None}
        if len(given) > 1:
            raise ValueError(
                f"params ({self.params}) and macs ({self.macs}) are both given. Give one of the two; set the other to None."
            )
        for name, value in given.items():
            if not 0 < value < 1:
                raise ValueError(
                    f"{name} ({value}) must lie between 0 and 1: the fraction that remains, for example --budget.{name} 0.5."
                )
        return self


class MasksConfig(Section):
    """Masks of single weights of the cut network, from the same statistics; the recovery keeps to them."""

    pattern: Pattern = None
    """`unstructured`, `N:M` such as 2:4 (N of M consecutive inputs stay), `block:SIZE` (consecutive inputs go together), `input:SIZE` (they go
    together for all outputs: a head of attention, in the projection that reads the heads). Empty: none."""
    only: str = "*"
    """Weights to mask, as a shell pattern over their names: `*attn.proj.weight`. The others stay whole."""
    keep: float | None = Field(default=None, gt=0, lt=1)
    """Fraction of the weights that stay; follows from an N:M pattern, and otherwise from `budget.params` where it is left out."""
    share: float = Field(default=0.5, gt=0, lt=1)
    """Where one budget holds for channels and weights: the part of the reduction (in powers of the budget) that falls to weights."""
    criterion: Names = ("snip_abs",)
    """Name in saliency.criteria.CRITERIA with a rule for weights; of several the ranks are fused."""
    criterion_weights: Floats = ()
    """Weight of each criterion in the fused rank; empty: all alike."""
    scope: Literal["auto", "global", "layer", "row"] = "auto"
    """How weights compete: all together, within their layer, or within one output; `auto` is the criterion's own."""


class ControlsConfig(Section):
    """The plans that the chosen criterion must beat."""

    criteria: Controls = ("random", "magnitude")
    """Cut and evaluated at the same budget before recovery; in one round, from the dense network, whatever `rounds` is."""
    recover: bool = False
    """Recover them, too (as costly as one recovery of the run's own, each)."""


class CalibrateConfig(Section):
    """Re-estimation of batch-norm statistics after the cut."""

    batches: int = Field(default=100, ge=0)
    """Batches of batch_size rows; 0 leaves the old statistics."""
    batch_size: int = Field(default=128, ge=2)
    """Rows in one batch of statistics."""


class EvaluateConfig(Section):
    """The final and intermediate accuracy."""

    batch_size: int = Field(default=64, ge=1)
    """Rows in one forward."""
    num_rows: int | None = Field(default=None, ge=1)
    """Rows of data.val, spread evenly; empty: all."""
    latency_batch: int = Field(default=32, ge=1)
    """Second batch size of the latency measurement; the first is 1."""
    latency_runs: int = Field(default=30, ge=3)
    """Repetitions; the median is reported."""


class ExportConfig(Section):
    """The pruned network for other runtimes, beside the artifact in RUN/model."""

    onnx: bool = False
    """Write model.onnx, and measure ONNX Runtime's latency of the dense and the pruned network. Needs the extra `export`."""
    program: bool = False
    """Write model.pt2, a torch.export program."""
    int8: bool = False
    """Write model-int8.onnx, and compare size, accuracy and ONNX Runtime's latency of the dense network, the pruned one, and that in INT8.
    Needs the extra `export`."""
    int8_rows: int = Field(default=512, ge=1)
    """Training rows that set the ranges of the activations."""


class WorkersConfig(Section):
    """How much of the cluster to use. The result of a data pass depends on `device` and `threads` alone; training also on
    `num_workers`, by rounding and by the rows that one batch norm sees."""

    num_workers: int | None = Field(default=None, ge=1)
    """Workers; empty: one for each GPU, or as many as the CPUs allow, also of nodes that join while a pass over the data runs."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto` takes GPUs when the cluster has any."""
    shard_over: int = Field(default=1, ge=1)
    """Workers that hold one network together, each some rows of its weights (FSDP2): for networks that do not fit one device. 1: none do."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of one worker's computation."""
    decode_threads: int = Field(default=1, ge=1)
    """Background threads of one worker that decode images."""
    address: str | None = None
    """Ray cluster to join; empty: the one of this job, or a local one."""
    commit_interval_s: float = Field(default=30.0, gt=0)
    """About how much work one commit holds: what a death can cost."""
    max_failures: int = Field(default=3, ge=0)
    """Deaths that one unit, or the training, may cause before the run gives up."""
    price_per_hour: float | None = Field(default=None, ge=0)
    """Of one worker, in any currency: the forecast and the report then say what the run costs."""


class RunConfig(Section):
    """One pruning run."""

    run_dir: str = "runs/run"
    """Where everything is kept; the same directory resumes. Must be shared storage on a cluster."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainingConfig = Field(default_factory=TrainingConfig)
    """Training before pruning; off (epochs = 0) for a network that is trained already."""
    sparsify: SparsifyConfig = Field(default_factory=SparsifyConfig)
    """Training with penalties, gates or changing masks, between `train` and scoring; off (epochs = 0) by default."""
    score: ScoreConfig = Field(default_factory=ScoreConfig)
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    masks: MasksConfig = Field(default_factory=MasksConfig)
    controls: ControlsConfig = Field(default_factory=ControlsConfig)
    calibrate: CalibrateConfig = Field(default_factory=CalibrateConfig)
    recover: TrainingConfig = Field(default_factory=lambda: TrainingConfig(epochs=3, distill_weight=0.7))
    """Training after the cut; with several rounds, after each."""
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    workers: WorkersConfig = Field(default_factory=WorkersConfig)
    rounds: int = Field(default=1, ge=1)
    """Rounds of score, plan, cut and recover (Renda et al., ICLR 2020): each removes the same part of what is left, and the last meets the
    budget. Each trains for `recover.epochs`."""
    seed: int = 0
    """Seed of initial weights, training order and augmentation."""
    quiet: bool = False
    """No progress at all."""

    @model_validator(mode="after")
    def _budget_is_given(self) -> RunConfig:
        if not self.budget.given and self.masks.pattern is None:
            raise ValueError(
                "budget: give budget.params or budget.macs, the fraction that remains, for example --budget.params 0.5; or "
                "masks.pattern, to mask weights and cut nothing."
            )
        if not self.budget.given and self.budget.max_blocks:
            raise ValueError(
                f"budget.max_blocks ({self.budget.max_blocks}) is part of a budget, and there is none: blocks go where something is cut. "
                "Give budget.params or budget.macs, too, or set it to 0."
            )
        if not self.budget.given and self.rounds > 1:
            raise ValueError(
                f"rounds ({self.rounds}) share the cutting out among them, and nothing is cut: weights are masked in the last round alone. "
                "Give budget.params or budget.macs, too, or set it to 1."
            )
        return self

    def of_round(self, number: int) -> RunConfig:
        """What round `number`, counted from 1, does: the dense network is trained before the first; masks, controls and other
        runtimes belong to what is left after the last."""
        if self.rounds == 1:
            return self
        changes: dict[str, Any] = {"seed": self.seed + number - 1}  # another order of the rows in each recovery
        if number > 1:
            score = self.score.model_copy(
                update={"statistics": ()}
            )  # what is kept for others, they take from the first
            changes |= {"train": TrainingConfig(), "sparsify": SparsifyConfig(), "score": score}
        if number < self.rounds:
            changes |= {"masks": MasksConfig(), "controls": ControlsConfig(criteria=()), "export": ExportConfig()}
        return self.model_copy(update=changes)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse(values: dict[str, Any]) -> RunConfig:
    """A RunConfig from plain data; every problem on a line of its own."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def load(path: str) -> RunConfig:
    """A RunConfig from a YAML file."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no mapping of configuration sections but {type(values).__name__}.")
    return parse(values)


def explain(error: ValidationError) -> str:
    """Pydantic's errors as lines `field = value: what is wrong, what now`."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{field}: there is no such field.{_suggest(item['loc'])}")
        elif item["type"] == "value_error":
            lines.append(f"{field + '.' if field else ''}{item['ctx']['error']}")
        else:
            lines.append(
                f"{field} = {item['input']!r}: {item['msg'].lower()}. Correct it in the YAML file or with --{field} VALUE."
            )
    return "\n".join(lines)


def _suggest(loc: tuple[int | str, ...]) -> str:
    section: Any = RunConfig
    for part in loc[:-1]:
        field = section.model_fields.get(str(part)) if hasattr(section, "model_fields") else None
        section = field.annotation if field is not None else None
    known = list(section.model_fields) if hasattr(section, "model_fields") else []
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f" Did you mean {close[0]}?" if close else f" Known: {', '.join(known)}."
