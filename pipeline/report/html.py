"""report.html: one self-contained page, made from summary.json alone; nothing in it is loaded from elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pipeline.report import plots, text
from pipeline.report.numbers import (
    COMPRESSED,
    ClassAccuracy,
    FrozenGroup,
    Network,
    Recovery,
    RoundFigures,
    Summary,
    Training,
    batch_sizes,
    complete,
    compressed,
    compressed_batch_sizes,
    networks,
    onnx_batch_sizes,
)

MOST_ROWS = 100
"""Longer tables are cut here; summary.json has every row."""
NAMED_CLASSES = 8
"""Classes listed at each end where there are too many to show all."""


def render(summary: Mapping[str, Any], *, written: float | None = None) -> str:
    """The page, as text.

    Args:
        summary: may lack any part; what is missing is shown as a dash, or left out by name.
        written: the time in the page's foot, in seconds since 1970; now by default.

    Raises:
        ValueError: as `numbers.complete`.
    """
    full = complete(summary)
    package = files("pipeline.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters = (text.percent, text.whole, text.duration, text.rate, text.unbroken)
    environment.filters.update({one.__name__: one for one in filters})
    template = environment.from_string(package.joinpath("page.html.j2").read_text(encoding="utf-8"))
    columns = networks(full)
    speed = _speed_batch(full)
    macs, macs_unit = _macs_scale(columns)
    latencies = [n.latency_ms.get(speed) if speed else None for n in columns]
    groups = full["plan"]["groups"]
    return template.render(
        s=full,
        css=Markup(package.joinpath("page.css").read_text(encoding="utf-8")),
        headline=headline(full),
        figures=key_figures(full),
        networks=columns,
        table=comparison(full),
        findings=findings(full),
        rounds=rounds(full),
        compression=compression(full),
        round_columns=ROUNDS,
        forms=[*COMPRESSED.values()],
        quantised=quantised(full),
        absent=absent(full),
        accuracy=[
            plots.accuracy_against(columns, macs, f"MACs of one row, {macs_unit}"),
            plots.accuracy_against(columns, latencies, f"latency at batch {speed}, ms"),
        ],
        recovered=any(n.after is not None for n in columns[1:]),
        kept=plots.kept_channels(groups) if full["plan"]["budget"] else [],
        kept_total=(sum(g["kept"] for g in groups), sum(g["size"] for g in groups)),
        zeros=zeros(full),
        curves=training_curves(full),
        settling=plots.curve(
            [*full["stability"]["curve"]], "plan_change", "removed channels exchanged, %", scale=100.0, x="rows"
        ),
        stages=plots.stage_times(full["stages"]),
        foretold=foretold(full),
        told_of_forecast=told_of_forecast(full),
        seconds=sum(stage["seconds"] or 0.0 for stage in full["stages"]),
        classes=plots.class_accuracy(full["per_class"]),
        many_classes=len(plots.measured_classes(full["per_class"])) > plots.CLASS_ROWS,
        extremes=class_extremes(full["per_class"]),
        frozen=frozen_by_reason(full["frozen"]),
        hashes=hashes(full),
        most_rows=MOST_ROWS,
        written=time.strftime("%Y-%m-%d %H:%M", time.localtime(written)),
    )


# --- sentences ------------------------------------------------------------------------------------------------------


def headline(summary: Summary) -> str:
    """The run in one sentence, without what was not measured; MACs come with a measured time only."""
    dense, ours, batch = summary["dense"], summary["pruned"], _speed_batch(summary)
    cost = summary["model"] or "The network"
    part, nonzero = text.share(ours["params"], dense["params"]), text.share(ours["nonzero_params"], dense["params"])
    params = f"{nonzero} of its parameters not zero" if _is_masked(summary) else f"{part} of its parameters"
    if batch and text.share(ours["macs"], dense["macs"]):
        faster = text.speedup(ours["latency_ms"][batch], dense["latency_ms"][batch])
        macs = f"{text.share(ours['macs'], dense['macs'])} of its MACs"
        remains = f"{macs} and {params}" if _is_masked(summary) else macs
        cost += f" with {remains} runs {faster} as fast at batch {batch}"
    elif part:
        cost += f" with {params}"
    last = networks(summary)[-1]
    if dense["top1"] is None or last.top1 is None:
        return f"{cost}: accuracy not measured"
    before = "" if last.after is not None else ", before any recovery"
    return f"{cost}: top-1 goes from {text.percent(dense['top1'])} to {text.percent(last.top1)}{before}"


def findings(summary: Summary) -> list[str]:
    """What a careful reader asks next: the controls, the noise of the measurement, the check of the cut."""
    columns, ours, verify, rows = networks(summary), summary["pruned"], summary["verify"], summary["data"]["val_rows"]
    found = []
    mine = ours["top1_before_recovery"]
    against = [
        f"{abs(100 * (mine - n.before)):.2f} points {'above' if mine >= n.before else 'below'} {n.name}"
        for n in columns
        if n.kind == "control" and n.before is not None and mine is not None
    ]
    if against:
        found.append(f"Before recovery, the chosen criterion is {' and '.join(against)}, at the same budget.")
    found += _in_rounds(summary) if against else []
    top1 = columns[-1].top1
    if rows and top1 is not None:
        error = 100 * math.sqrt(max(top1 * (1 - top1), 0.0) / rows)
        found.append(f"Measured on {rows:,} validation rows: one standard error of a top-1 is {error:.2f} points.")
    if ours["agreement"] is not None:
        same = text.percent(ours["agreement"])
        found.append(f"The pruned network gives the dense one's answer on {same} of the rows.")
    if ours["top1"] is not None:
        found.append("Figures after recovery are those of the last epoch, not of the best.")
    if verify["max_abs_diff"] is not None:
        found.append(
            f"Cut and masked dense network, compared on {text.whole(verify['rows'])} rows: outputs differ by at "
            f"most {text.small(verify['max_abs_diff'])} (relative {text.small(verify['max_rel_diff'])})."
        )
    if onnx_batch_sizes(summary):
        found.append("ONNX Runtime was timed on the CPU, with as many threads as a worker has.")
    return [*found, *_sparsified(summary), *_shortened(summary), *_settled(summary), *_masked(summary)]


def _in_rounds(summary: Summary) -> list[str]:
    """What the comparison with the controls is worth."""
    rounds = summary["rounds"]
    if not rounds:
        return []
    recovery = ", with a recovery after each" if rounds[0]["top1"] is not None else ""
    once = (
        ", and recovered once" if any(control["top1"] is not None for control in summary["controls"].values()) else ""
    )
    return [f"It cuts in {len(rounds)} rounds{recovery}; the controls are cut from the dense network in one{once}."]


def _sparsified(summary: Summary) -> list[str]:
    training, top1, dense = summary["sparsify"], summary["sparse"]["top1"], summary["dense"]["top1"]
    found = []
    if training and training["zeros"] is not None:
        near = training["near_zeros"]
        more = "" if near is None else f", {text.percent(near - training['zeros'], 1)} next to it"
        share = text.percent(training["zeros"], 1)
        found.append(f"Training towards zeros ({training['method']}) brought {share} of the weights to zero{more}.")
    if top1 is not None and dense is not None:
        found.append(
            f"Before anything was cut, and with batch norm as training towards zeros left it, top-1 went from {text.percent(dense)} to "
            f"{text.percent(top1)}."
        )
    return found


def _shortened(summary: Summary) -> list[str]:
    removed, every = summary["plan"]["removed_blocks"], summary["plan"]["num_blocks"]
    if every is None:
        return []
    return [
        f"Of {every} residual blocks that can go, {len(removed)} are removed{': ' if removed else ''}{', '.join(removed)}."
    ]


def _settled(summary: Summary) -> list[str]:
    stability = summary["stability"]
    if not stability["curve"] or stability["rows"] is None:
        return []
    half = max(stability["curve"], key=lambda sample: sample["rows"])
    error = ""
    if stability["median_error"] is not None:
        median, most = (text.percent(stability[key], 1) for key in ("median_error", "p90_error"))  # type: ignore[literal-required]
        error = f" The standard error of a channel's saliency is {median} of it in the median, at most {most} for nine of ten."
    return [
        f"From {half['rows']:,} to {stability['rows']:,} rows the plan exchanges {text.percent(half['plan_change'], 1)} of the removed "
        f"channels; the ranks correlate with {half['rank_correlation']:.4f}.{error}"
    ]


def _masked(summary: Summary) -> list[str]:
    masks = summary["weight_masks"]
    if masks["kept"] is None:
        return []
    return [
        f"Masks of single weights ({masks['pattern']}, {masks['criterion']}) keep {text.share(masks['kept'], masks['weights'])} of "
        f"{text.count(masks['weights'])} weights that the cut leaves. A dense runtime gains no time from them."
    ]


def _is_masked(summary: Summary) -> bool:
    return summary["pruned"]["nonzero_params"] not in (None, summary["pruned"]["params"])


def absent(summary: Summary) -> list[str]:
    """Parts that this run has left out."""
    parts = {
        "accuracy": summary["dense"]["top1"] is not None,
        "latency": bool(batch_sizes(summary)),
        "controls": any(n.kind == "control" for n in networks(summary)),
        "saliency": summary["saliency"]["sha256"] is not None,
        "plan": summary["plan"]["sha256"] is not None,
        "check of the cut": summary["verify"]["max_abs_diff"] is not None,
        "recovery": bool(summary["recover"]["history"]),
        "accuracy of each class": bool(plots.measured_classes(summary["per_class"])),
    }
    return [name for name, there in parts.items() if not there]


# --- figures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A figure in large type with its dense counterpart below."""

    name: str
    value: str
    note: str


def key_figures(summary: Summary) -> list[Figure]:
    dense, ours = summary["dense"], summary["pruned"]
    last, speed = networks(summary)[-1], _speed_batch(summary)
    change = text.points(last.top1, dense["top1"])
    accuracy = "top-1" if last.after is not None else "top-1 before recovery"
    params = (NONZERO, ours["nonzero_params"]) if _is_masked(summary) else ("parameters", ours["params"])
    return [
        Figure(accuracy, text.percent(last.top1), f"{change} points" if change else ""),
        _cost_figure(*params, dense["params"], text.count),
        _cost_figure("MACs of one row", ours["macs"], dense["macs"], text.count),
        _cost_figure(
            f"latency, batch {speed}", ours["latency_ms"][speed], dense["latency_ms"][speed], text.milliseconds
        )
        if speed
        else Figure("latency", text.MISSING, text.NOT_MEASURED),
    ]


def _cost_figure(name: str, ours: float | None, dense: float | None, shown: Callable[[float | None], str]) -> Figure:
    part = text.share(ours, dense)
    return Figure(name, shown(ours), f"{part} of {shown(dense)}" if part else "")


BEFORE, AFTER, NONZERO = "top-1 before recovery", "top-1 after recovery", "non-zero parameters"
ROUNDS = ("parameters", "MACs", BEFORE, AFTER, "time")


@dataclass(frozen=True)
class Foretold:
    """A line of the table of forecast and fact."""

    name: str
    forecast: str
    fact: str
    ratio: str
    """Of the fact to the forecast."""
    note: str = ""


@dataclass(frozen=True)
class Cell:
    value: str
    note: str = ""
    span: int = 1


def comparison(summary: Summary) -> list[tuple[str, list[Cell]]]:
    """Rows of the table dense | controls | ours. Latencies come right below the MACs, also where none was measured, and ONNX Runtime's
    below them where they were."""
    columns = networks(summary)
    dense = columns[0]
    rest = columns[1:]
    rows = [
        (BEFORE, [Cell(text.percent(dense.top1), span=2), *(_accuracy(n.before, dense.top1) for n in rest)]),
        (AFTER, [_accuracy(n.after, dense.top1) for n in rest]),
        ("top-5", [Cell(text.percent(dense.top5)), *(_accuracy(n.top5, dense.top5) for n in rest)]),
        ("loss", [Cell(text.MISSING if n.loss is None else f"{n.loss:.3f}") for n in columns]),
        ("parameters", [_cost(n, n.params, dense.params, text.count(n.params)) for n in columns]),
    ]
    if _is_masked(summary):
        left = [dense.params, *(n.nonzero_params for n in rest)]
        rows.append((NONZERO, [_cost(n, v, dense.params, text.count(v)) for n, v in zip(columns, left, strict=True)]))
    rows.append(("MACs of one row", [_cost(n, n.macs, dense.macs, text.count(n.macs)) for n in columns]))
    sizes = batch_sizes(summary)
    rows += [(f"latency, batch {size}", _times(columns, [n.latency_ms.get(size) for n in columns])) for size in sizes]
    if not sizes:
        rows.append(("latency", [Cell(text.MISSING, text.NOT_MEASURED) for _ in columns]))
    for size in onnx_batch_sizes(summary):
        rows.append((f"ONNX, batch {size}", _times(columns, [n.onnx_latency_ms.get(size) for n in columns])))
    return rows


def rounds(summary: Summary) -> list[tuple[str, list[Cell]]]:
    """A row for each of several rounds, below ROUNDS; empty where there is only one."""
    dense = summary["dense"]

    def cells(found: RoundFigures) -> list[Cell]:
        return [
            Cell(text.count(found["params"]), text.share(found["params"], dense["params"])),
            Cell(text.count(found["macs"]), text.share(found["macs"], dense["macs"])),
            _accuracy(found["top1_before_recovery"], dense["top1"]),
            _accuracy(found["top1"], dense["top1"]),
            Cell(text.duration(found["seconds"])),
        ]

    return [(f"{found['round']}", cells(found)) for found in summary["rounds"] or ()]


def compression(summary: Summary) -> list[tuple[str, list[Cell]]]:
    """Rows of the table dense | cut | cut + INT8, all as ONNX files; empty where nothing was quantised."""
    forms = compressed(summary)
    if not forms:
        return []

    def costs(values: Sequence[float | None], shown: Callable[[float | None], str]) -> list[Cell]:
        dense, *rest = values
        return [Cell(shown(dense)), *(Cell(shown(value), text.share(value, dense)) for value in rest)]

    dense, *rest = [form["top1"] for form in forms]
    rows = [
        ("top-1", [Cell(text.percent(dense)), *(_accuracy(top1, dense) for top1 in rest)]),
        ("size on disk", costs([form["bytes"] for form in forms], text.num_bytes)),
    ]
    for size in compressed_batch_sizes(summary):
        times = [form["latency_ms"].get(size) for form in forms]
        rows.append((f"latency, batch {size}", costs(times, text.milliseconds)))
    return rows


def quantised(summary: Summary) -> str:
    """What the table of `compression` was measured on."""
    found = summary["compression"]
    return (
        f"ONNX files, {found['runtime'] or 'ONNX Runtime'} on the CPU with {text.whole(found['threads'])} "
        f"{'thread' if found['threads'] == 1 else 'threads'}, {text.whole(found['rows'])} validation rows. INT8: static, weights of "
        f"{text.whole(found['weight_bits'])} bits with a scale for each output, ranges of the activations from "
        f"{text.whole(found['calibration_rows'])} training rows; it gives the cut network's answer on "
        f"{text.percent(found['cut_int8']['agreement'])} of the rows."
    )


def _times(columns: Sequence[Network], milliseconds: Sequence[float | None]) -> list[Cell]:
    """The dense network's stands first."""
    return [_cost(n, ms, milliseconds[0], text.milliseconds(ms)) for n, ms in zip(columns, milliseconds, strict=True)]


def _accuracy(value: float | None, dense: float | None) -> Cell:
    return Cell(text.percent(value), text.points(value, dense))


def _cost(network: Network, value: float | None, dense: float | None, shown: str) -> Cell:
    return Cell(shown, "" if network.kind == "dense" else text.share(value, dense))


def _speed_batch(summary: Summary) -> str | None:
    """The largest batch at which both the dense and the pruned network were timed."""
    dense, ours = summary["dense"]["latency_ms"], summary["pruned"]["latency_ms"]
    both = [size for size in batch_sizes(summary) if dense.get(size) and ours.get(size)]
    return both[-1] if both else None


def _macs_scale(columns: Sequence[Network]) -> tuple[list[float | None], str]:
    largest = max((n.macs or 0 for n in columns), default=0)
    size, unit = next(((s, u) for s, u in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if largest >= s), (1e3, "k"))
    return [None if n.macs is None else n.macs / size for n in columns], unit


def foretold(summary: Summary) -> list[Foretold]:
    """Each stage of which there was a forecast, and all together that are done; empty where there was none."""
    stages = summary["forecast"]["stages"]
    found = []
    for stage in stages:
        share, took = stage["share_done"], stage["seconds"]
        ratio = f"{took / stage['forecast_seconds']:.2f}" if took is not None and stage["forecast_seconds"] else ""
        note = f"after {text.percent(share, 0)} of it" if share else ""
        found.append(
            Foretold(stage["name"], text.duration(stage["forecast_seconds"]), text.duration(took), ratio, note)
        )
    both = [(stage["forecast_seconds"], stage["seconds"]) for stage in stages if stage["seconds"] is not None]
    if len(both) > 1:
        forecast, fact = sum(one for one, _ in both), sum(one for _, one in both)
        ratio = f"{fact / forecast:.2f}" if forecast else ""
        found.append(Foretold("together", text.duration(forecast), text.duration(fact), ratio))
    return found


def told_of_forecast(summary: Summary) -> str:
    """The first forecast of the whole run, and what it came to."""
    found = summary["forecast"]
    if found["worker_hours"] is None:
        return ""

    def told(prefix: str) -> str:
        seconds, worker_hours, cost = (found[f"{prefix}{key}"] for key in ("seconds", "worker_hours", "cost"))  # type: ignore[literal-required]
        price = "" if cost is None else f", at a price of {cost:,.2f}"
        return f"{text.duration(seconds)} and {text.hours(worker_hours)} worker-hours{price}"

    used = "" if found["used_worker_hours"] is None else f" It came to {told('used_')}."
    return f"The first forecast of the whole run was {told('')}.{used}"


# --- the other sections ---------------------------------------------------------------------------------------------


def training_curves(summary: Summary) -> list[tuple[str, Markup, str]]:
    """(title, plot, caption) of each figure that was recorded while training."""
    found = []
    for title, training in (("Recovery", summary["recover"]), ("Training before pruning", summary["train"])):
        for key, name, scale in (("loss", "training loss", 1.0), ("top1", "validation top-1, %", 100.0)):
            plot = plots.curve(training["history"], key, name, scale=scale)
            if plot and key == "loss":
                found.append((title, plot, _told(training)))
            elif plot:
                found.append((f"{title}: accuracy", plot, "Measured on the way."))
    return found


def _told(training: Training) -> str:
    told = (
        f"{text.whole(training['epochs'])} epochs",
        text.duration(training["seconds"]),
        text.rate(training["rows_per_s"]),
    )
    caption = [part for part in told if not part.startswith(text.MISSING)]
    history = training["history"]
    unknown = sum(1 for record in history if record["loss"] is None)
    if unknown:
        caption.append(f"{unknown} of {len(history)} records have no finite loss")
    return ", ".join(caption)


OF_METHODS = {"closed_gates": "gates that are closed, %", "remains": "what is not zero, % of what the aim counts"}
"""What methods record of their way to zeros, beside the weights that are zero."""


@dataclass(frozen=True)
class Zeros:
    """A section about a training that made zeros, or kept them."""

    title: str
    curves: list[Markup]
    told: str
    layers: list[Markup]
    legend: str


def zeros(summary: Summary) -> list[Zeros]:
    """Training towards zeros, and recovery under masks; those of them that there were."""
    found = []
    if sparse := summary["sparsify"]:
        history = sparse["history"]
        own = [plots.curve(history, key, title, scale=100.0) for key, title in OF_METHODS.items()]
        on_the_way = plots.curve(history, "zeros", "weights that are zero, %", scale=100.0)
        if any(own) and not any(record["zeros"] for record in history):
            on_the_way = None  # gates and scales stand before the weights: these are zero in the end alone
        curves = [plots.curve(history, "loss", "training loss"), on_the_way, *own]
        told = ", ".join(part for part in (sparse["method"], _told(sparse)) if part)
        found.append(_zeros("Training towards zeros", sparse, [plot for plot in curves if plot], told))
    if summary["recover"]["layers"]:
        found.append(_zeros("Zeros after recovery", summary["recover"], [], ""))
    return found


def _zeros(title: str, training: Recovery, curves: list[Markup], told: str) -> Zeros:
    share, layers = training["zeros"], training["layers"]
    whole = "" if share is None else f"{text.percent(share, 1)} of all entries of "
    legend = (
        f"{whole}{len(layers)} weights, in the network's order. Fill: exactly zero; pale: at most a hundredth of the weight's largest entry; "
        "dotted: the mean over all entries."
    )
    return Zeros(title, curves, told, plots.layer_zeros(layers, share or 0.0), legend)


def class_extremes(classes: Sequence[ClassAccuracy]) -> list[tuple[str, list[tuple[str, float, float, str]]]]:
    """Classes that lost and gained most: (title, rows of name, dense, pruned, difference in points)."""
    measured = plots.measured_classes(classes)
    ordered = sorted(measured, key=lambda one: (one[2] - one[1], one[0]))
    ends = (
        ("Lost most", [one for one in ordered[:NAMED_CLASSES] if one[2] < one[1]]),
        ("Gained most", [one for one in ordered[: -NAMED_CLASSES - 1 : -1] if one[2] > one[1]]),
    )
    return [(title, [(*one, text.points(one[2], one[1])) for one in rows]) for title, rows in ends if rows]


def frozen_by_reason(frozen: Sequence[FrozenGroup]) -> list[tuple[str, int, list[FrozenGroup]]]:
    """Reason, number of channels and groups, in order of first appearance."""
    by_reason: dict[str, list[FrozenGroup]] = {}
    for group in frozen:
        by_reason.setdefault(group["reason"] or "no reason recorded", []).append(group)
    return [(reason, sum(group["size"] or 0 for group in groups), groups) for reason, groups in by_reason.items()]


def hashes(summary: Summary) -> list[tuple[str, str]]:
    named = {
        "saliency": summary["saliency"]["sha256"],
        "plan": summary["plan"]["sha256"],
        "masks": summary["masks"]["sha256"],
        "weight masks": summary["weight_masks"]["sha256"],
        "training rows": summary["data"]["train"],
        "validation rows": summary["data"]["val"],
    }
    more = summary.get("fingerprints") or {}
    return [
        (name, str(value)) for name, value in {**named, **(more if isinstance(more, dict) else {})}.items() if value
    ]
