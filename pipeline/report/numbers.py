"""summary.json: every figure of a run under stable keys. What was not measured is null, never 0."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, cast


class Accuracy(TypedDict):
    """Fractions of the validation rows."""

    top1: float | None
    top5: float | None
    loss: float | None
    agreement: float | None


class Measured(Accuracy):
    """One network. MACs are those of one row, latency by batch size."""

    params: int | None
    macs: int | None
    latency_ms: dict[str, float | None]
    onnx_latency_ms: dict[str, float | None]
    """With ONNX Runtime on the CPU, whatever device `latency_ms` was measured on."""


class Pruned(Measured):
    """`top1` and all beside it hold after recovery; without one there is `top1_before_recovery` alone."""

    top1_before_recovery: float | None
    nonzero_params: int | None
    """Those that no mask of single weights removes; all of them without masks."""


class Saliency(TypedDict):
    criterion: str | None
    rows: int | None
    units: int | None
    workers: int | None
    sha256: str | None
    seconds: float | None
    rows_per_s: float | None
    skipped: int | None
    commits: int | None
    lost_workers: int | None
    resumed_units: int | None


class PlannedWidth(TypedDict):
    name: str
    size: int
    kept: int


class PlanFigures(TypedDict):
    sha256: str | None
    budget: dict[str, float]
    scope: str | None
    groups: list[PlannedWidth]
    removed_blocks: list[str]
    num_blocks: int | None
    """Residual blocks that could have gone; null where none was to go."""


class Masks(TypedDict):
    sha256: str | None


class Sample(TypedDict):
    """The plan that a part of the rows gives, against that of all rows."""

    rows: int
    plan_change: float
    """Share of the removed channels that the two plans do not have in common."""
    rank_correlation: float
    """Spearman's, over all channels."""


class Stability(TypedDict):
    """How the plan settles with the number of rows. Standard errors are relative to a channel's saliency, over the channels."""

    rows: int | None
    curve: list[Sample]
    median_error: float | None
    p90_error: float | None


class WeightMasks(TypedDict):
    """Masks of single weights of the cut network; `weights` is the number of those that were maskable."""

    pattern: str | None
    criterion: str | None
    scope: str | None
    sha256: str | None
    kept: int | None
    weights: int | None
    num_whole: int | None


class Compressed(TypedDict):
    """One form of the network, as an ONNX file on the CPU. `agreement` is with the answers of the cut one."""

    bytes: int | None
    top1: float | None
    agreement: float | None
    latency_ms: dict[str, float | None]


class Compression(TypedDict):
    """The dense network, the pruned one, and that in INT8, on the same validation rows; `sha256` is that of the INT8 file."""

    rows: int | None
    calibration_rows: int | None
    weight_bits: int | None
    runtime: str | None
    threads: int | None
    runs: int | None
    sha256: str | None
    dense: Compressed
    cut: Compressed
    cut_int8: Compressed


class RoundFigures(TypedDict):
    """What one of several rounds has left; `seconds` are those of all its stages."""

    round: int
    params: int | None
    macs: int | None
    top1_before_recovery: float | None
    top1: float | None
    seconds: float | None


class Verified(TypedDict):
    """Largest difference between the outputs of the cut network and of the masked dense one."""

    max_abs_diff: float | None
    max_rel_diff: float | None
    rows: int | None


class FrozenGroup(TypedDict):
    group: str
    size: int
    operation: str
    where: str
    reason: str


class Training(TypedDict):
    """`history`: records of step, epoch, loss, lr, and top1 where it was measured."""

    epochs: int | None
    seconds: float | None
    rows_per_s: float | None
    history: list[dict[str, Any]]


class Layer(TypedDict):
    """Shares of a weight's entries: exactly zero; at most a hundredth of the largest, zeros included."""

    name: str
    zeros: float
    near_zeros: float


class Recovery(Training):
    """`zeros` and all beside it: of the weights of two dimensions and more; null and empty where no masks were kept."""

    zeros: float | None
    near_zeros: float | None
    layers: list[Layer]


class SparseTraining(Recovery):
    """Records of the history have `zeros`, too, and what the methods say of themselves."""

    method: str | None


class StageTime(TypedDict):
    name: str
    state: str
    seconds: float | None
    started: float | None
    finished: float | None
    attempts: int | None
    """Starts that it took; the time is that of the last."""


class Foreseen(TypedDict):
    """A stage of which there was a forecast before it began, or while it was young."""

    name: str
    forecast_seconds: float
    share_done: float
    """Of its rows, when the forecast was made."""
    seconds: float | None
    """Null while it is not done, and where it took several starts: the time is known of the last one alone."""


class ForecastFigures(TypedDict):
    """`seconds` and those beside it: the first forecast of the whole run; `used_`: what it came to, once all is done, in one start each.
    Worker-hours are those of all workers for all the time; costs are in the currency of `price_per_hour`."""

    seconds: float | None
    worker_hours: float | None
    cost: float | None
    used_seconds: float | None
    used_worker_hours: float | None
    used_cost: float | None
    price_per_hour: float | None
    stages: list[Foreseen]


class BadRow(TypedDict):
    file: str
    row_group: int | None
    row: int | None
    cause: str


ClassAccuracy = TypedDict("ClassAccuracy", {"class": int | str, "dense": float | None, "pruned": float | None})


class Data(TypedDict):
    """Fingerprints of the rows."""

    train: str | None
    val: str | None
    val_rows: int | None


class Summary(TypedDict):
    model: str | None
    dense: Measured
    sparse: Accuracy
    """What training with penalties or masks made of the dense network, before anything was cut."""
    pruned: Pruned
    controls: dict[str, Pruned]
    rounds: list[RoundFigures] | None
    """Null where there is only one."""
    saliency: Saliency
    plan: PlanFigures
    masks: Masks
    stability: Stability
    weight_masks: WeightMasks
    compression: Compression
    verify: Verified
    frozen: list[FrozenGroup]
    train: Training
    sparsify: SparseTraining | None
    """Null where nothing was trained towards zeros."""
    recover: Recovery
    stages: list[StageTime]
    forecast: ForecastFigures
    bad_rows: list[BadRow]
    per_class: list[ClassAccuracy]
    data: Data
    environment: dict[str, Any]


_ACCURACY = ("top1", "top5", "loss", "agreement")
_MEASURED = (*_ACCURACY, "params", "macs")
_PRUNED = ("top1_before_recovery", *_MEASURED, "nonzero_params")
_LATENCIES = ("latency_ms", "onnx_latency_ms")
_PASS = ("commits", "lost_workers", "resumed_units")
_CONTROLS = ("random", "magnitude")
_SECTIONS: dict[str, tuple[str, ...]] = {
    "dense": _MEASURED,
    "sparse": _ACCURACY,
    "pruned": _PRUNED,
    "saliency": ("criterion", "rows", "units", "workers", "sha256", "seconds", "rows_per_s", "skipped", *_PASS),
    "plan": ("sha256", "scope", "num_blocks"),
    "masks": ("sha256",),
    "stability": ("rows", "median_error", "p90_error"),
    "weight_masks": ("pattern", "criterion", "scope", "sha256", "kept", "weights", "num_whole"),
    "compression": ("rows", "calibration_rows", "weight_bits", "runtime", "threads", "runs", "sha256"),
    "verify": ("max_abs_diff", "max_rel_diff", "rows"),
    "train": ("epochs", "seconds", "rows_per_s"),
    "recover": ("epochs", "seconds", "rows_per_s", "zeros", "near_zeros"),
    "forecast": ("seconds", "worker_hours", "cost", "used_seconds", "used_worker_hours", "used_cost", "price_per_hour"),
    "data": ("train", "val", "val_rows"),
}
_RECORDS: dict[str, tuple[str, ...]] = {
    "rounds": ("round", "params", "macs", "top1_before_recovery", "top1", "seconds"),
    "plan.groups": ("name", "size", "kept"),
    "stability.curve": ("rows", "plan_change", "rank_correlation"),
    "frozen": ("group", "size", "operation", "where", "reason"),
    "stages": ("name", "state", "seconds", "started", "finished", "attempts"),
    "forecast.stages": ("name", "forecast_seconds", "share_done", "seconds"),
    "bad_rows": ("file", "row_group", "row", "cause"),
    "per_class": ("class", "dense", "pruned"),
    "train.history": ("step", "epoch", "loss", "lr"),
    "recover.history": ("step", "epoch", "loss", "lr"),
    "recover.layers": ("name", "zeros", "near_zeros"),
}
COMPRESSED = {"dense": "dense", "cut": "cut", "cut_int8": "cut + INT8"}
"""Forms of the network in `compression`, and what they are called."""
_ENVIRONMENT = ("command", "python", "device", "cpus")
_ACCURACIES = {"top1", "top5", "agreement", "top1_before_recovery"}
_TEXTS = {"criterion", "method", "sha256", "scope", "pattern", "runtime"}


def complete(given: Mapping[str, Any]) -> Summary:
    """All keys of summary.json, filled from what is given: a missing or null part becomes nulls and empty lists.

    Keys that are not known here stay. A number that is not finite becomes null, since JSON has none.

    Raises:
        ValueError: a part of the wrong shape, or an accuracy outside [0, 1]; the message names its key.
    """
    result: dict[str, Any] = {"model": None, **_finite(given)}
    for name, keys in _SECTIONS.items():
        result[name] = _section(name, result.get(name), keys)
    for network in (result["dense"], result["pruned"]):
        network.update(_latencies(network))
    controls = _mapping("controls", result.get("controls"))
    result["controls"] = {
        name: _control(f"controls.{name}", controls.get(name)) for name in dict.fromkeys((*_CONTROLS, *controls))
    }
    for form in COMPRESSED:
        section = _section(f"compression.{form}", result["compression"].get(form), ("bytes", "top1", "agreement"))
        result["compression"][form] = {**section, **_latencies(section, ("latency_ms",))}
    result["plan"]["budget"] = _mapping("plan.budget", result["plan"].get("budget"))
    result["plan"]["removed_blocks"] = list(result["plan"].get("removed_blocks") or [])
    result["environment"] = {**dict.fromkeys(_ENVIRONMENT), **_mapping("environment", result.get("environment"))}
    for path, keys in _RECORDS.items():
        *parents, last = path.split(".")
        holder = result[parents[0]] if parents else result
        holder[last] = _records(path, holder.get(last), keys)
    result["rounds"] = result["rounds"] or None
    result["sparsify"] = _sparse_training(_mapping("sparsify", result.get("sparsify")))
    for group in result["plan"]["groups"]:
        kept, size = group["kept"], group["size"]
        if not isinstance(kept, int) or not isinstance(size, int) or not 0 <= kept <= size:
            raise ValueError(f"summary: plan.groups has {group!r}; 0 <= kept <= size, in whole channels.")
    return cast(Summary, result)


def to_json(summary: Mapping[str, Any]) -> str:
    """Sorted and indented, so that two runs can be compared line by line."""
    return json.dumps(complete(summary), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def from_json(text: str) -> Summary:
    return complete(json.loads(text))


# --- the networks of a run side by side -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Network:
    """A column of the comparison. `before`, `after`: top-1 before and after recovery; the dense one has `after`."""

    name: str
    kind: str
    """`dense`, `control` or `ours`."""
    before: float | None
    after: float | None
    top5: float | None
    loss: float | None
    agreement: float | None
    params: int | None
    macs: int | None
    latency_ms: dict[str, float | None]
    onnx_latency_ms: dict[str, float | None]
    scope: str | None = None
    nonzero_params: int | None = None

    @property
    def top1(self) -> float | None:
        """Of the network as it was left: after recovery where there was one."""
        return self.before if self.after is None else self.after


def networks(summary: Summary) -> list[Network]:
    """dense | random | magnitude | other controls | ours. A control of which nothing is known is left out."""
    criterion = summary["saliency"]["criterion"]
    found = [_network("dense", "dense", summary["dense"])]
    found += [
        _network(name, "control", control)
        for name, control in summary["controls"].items()
        if control["params"] is not None or control["top1_before_recovery"] is not None
    ]
    return [
        *found,
        _network(
            f"ours ({criterion})" if criterion else "ours",
            "ours",
            {"scope": summary["plan"]["scope"] or summary["weight_masks"]["scope"], **summary["pruned"]},
        ),
    ]


def batch_sizes(summary: Summary) -> list[str]:
    """Batch sizes at which a latency was measured, smallest first."""
    return _sizes(summary, "latency_ms")


def onnx_batch_sizes(summary: Summary) -> list[str]:
    """The same of ONNX Runtime."""
    return _sizes(summary, "onnx_latency_ms")


def compressed_batch_sizes(summary: Summary) -> list[str]:
    """Batch sizes at which the INT8 network was timed beside the others."""
    return _ascending({size for form in compressed(summary) for size in form["latency_ms"]})


def compressed(summary: Summary) -> list[Compressed]:
    """dense | cut | cut + INT8; empty where nothing was quantised."""
    found = summary["compression"]
    forms = [found["dense"], found["cut"], found["cut_int8"]]
    return forms if found["sha256"] is not None else []


def _sizes(summary: Summary, key: Literal["latency_ms", "onnx_latency_ms"]) -> list[str]:
    every = [summary["dense"], summary["pruned"], *summary["controls"].values()]
    return _ascending({size for network in every for size, value in network[key].items() if value is not None})


def _ascending(sizes: set[str]) -> list[str]:
    return sorted(sizes, key=lambda size: (int(size) if size.isdigit() else math.inf, size))


def _network(name: str, kind: str, values: Mapping[str, Any]) -> Network:
    rest: dict[str, Any] = {key: values.get(key) for key in (*_MEASURED[1:], *_LATENCIES, "scope", "nonzero_params")}
    return Network(name, kind, values.get("top1_before_recovery"), values["top1"], **rest)


# --- shapes ---------------------------------------------------------------------------------------------------------


def _finite(value: Any) -> Any:
    """A copy in plain values, without NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mapping(path: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"summary: {path} is {value!r}; it is a mapping, or null where it was not measured.")
    return value or {}


def _section(path: str, value: Any, keys: Sequence[str]) -> dict[str, Any]:
    section = {**dict.fromkeys(keys), **_mapping(path, value)}
    for key in keys:
        _check(f"{path}.{key}", section[key], text=key in _TEXTS or (path == "data" and key != "val_rows"))
    return section


def _control(path: str, value: Any) -> dict[str, Any]:
    control = _section(path, value, _PRUNED)
    return {**control, **_latencies(control)}


def _sparse_training(given: dict[str, Any]) -> dict[str, Any] | None:
    if not given:
        return None
    return {
        **_section("sparsify", given, ("method", *_SECTIONS["recover"])),
        "history": _records("sparsify.history", given.get("history"), (*_RECORDS["recover.history"], "zeros")),
        "layers": _records("sparsify.layers", given.get("layers"), _RECORDS["recover.layers"]),
    }


def _latencies(network: Mapping[str, Any], keys: Sequence[str] = _LATENCIES) -> dict[str, dict[str, float | None]]:
    found = {key: _mapping(key, network.get(key)) for key in keys}
    for key, times in found.items():
        for size, milliseconds in times.items():
            _check(f"{key}.{size}", milliseconds)
    return found


def _records(path: str, value: Any, keys: Sequence[str]) -> list[dict[str, Any]]:
    if value is not None and not isinstance(value, list):
        raise ValueError(f"summary: {path} is {value!r}; it is a list, empty where there is nothing to tell.")
    return [{**dict.fromkeys(keys), **_mapping(f"{path}[{i}]", record)} for i, record in enumerate(value or [])]


def _check(path: str, value: Any, *, text: bool = False) -> None:
    kind: Any = str if text else int | float
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        wanted = "text" if text else "a number"
        raise ValueError(f"summary: {path} is {value!r}; it is {wanted}, or null where it was not measured.")
    if value is not None and path.rsplit(".", 1)[-1] in _ACCURACIES and not 0 <= value <= 1:
        raise ValueError(f"summary: {path} is {value!r}; accuracies are fractions between 0 and 1, not percent.")
