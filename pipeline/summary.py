"""RUN/report: the figures of a run, gathered from what its stages left, as summary.json and report.html."""

from __future__ import annotations

from typing import Any

from pipeline import artifacts
from pipeline.execution.train import read_history
from pipeline.pruning.masks import load_masks, masks_sha256
from pipeline.report import numbers
from pipeline.report.forecast import Forecast
from pipeline.report.html import render
from pipeline.run import Run
from pipeline.stages import forecast
from pipeline.stages.planning import mask_rules, networks, plan_rules
from pipeline.training.policy import shares_of_zeros


def write_report(run: Run) -> dict[str, Any]:
    """Write both files and return the summary. What a run has left out, or has not come to yet, is null, never 0."""
    summary = dict(numbers.complete(summarise(run)))
    artifacts.write_bytes(run.path("report", "summary.json"), numbers.to_json(summary).encode())
    artifacts.write_bytes(run.path("report", "report.html"), render(summary).encode())
    return summary


def _read(run: Run, *parts: str) -> Any:
    path = run.path(*parts)
    return artifacts.read_json(path) if artifacts.exists(path) else None


def summarise(run: Run) -> dict[str, Any]:
    before, after = _read(run, "evaluation", "before.json"), _read(run, "evaluation", "after.json")
    config = run.config
    return {
        "model": config.model.name,
        "dense": {**_accuracy(before, "dense"), **_costs(run, None), **_latencies(run, "dense")},
        "sparse": _accuracy(before, "sparse"),
        "pruned": _network(run, before, after, "ours"),
        "rounds": [_round(one) for one in run.rounds] if run.base else None,
        "controls": {
            name: {**_network(run, before, after, name), "scope": _scope(run, name)}
            for name in networks(run)
            if name != "ours"
        },
        "saliency": _saliency(run),
        "plan": _plan(run),
        "masks": {"sha256": _masks_sha256(run)},
        "stability": _stability(run),
        "weight_masks": _weight_masks(run),
        "compression": _read(run, "compression.json"),
        "verify": _verify(run),
        "frozen": _frozen(run),
        "train": _training(run.first, "dense", run.given.train.epochs),
        "sparsify": _sparsify(run.first),
        "recover": _recover(run),
        "stages": [
            {
                "name": name,
                "state": r.state,
                "seconds": r.seconds if r.state == "done" else None,
                "started": r.started,
                "finished": r.finished,
                "attempts": r.attempts,
            }
            for name, r in run.stages.items()
        ],
        "forecast": _forecast(run),
        "bad_rows": _bad_rows(run, before),
        "per_class": _per_class(before, after),
        "data": {
            "train": run.train_rows.fingerprint,
            "val": run.val_rows.fingerprint,
            "val_rows": before["rows"] if before else None,
        },
        "environment": _read(run, "environment.json"),
    }


def _round(run: Run) -> dict[str, Any]:
    before, after = (_read(run, "evaluation", f"{name}.json") for name in ("before", "after"))
    found = _network(run, before, after, "ours")
    keys = ("params", "macs", "top1_before_recovery", "top1")
    seconds = sum(record.seconds for record in run.manifest.stages.values() if record.state == "done")
    return {"round": run.number, **{key: found.get(key) for key in keys}, "seconds": seconds or None}


def _network(run: Run, before: Any, after: Any, name: str) -> dict[str, Any]:
    top1_before = _accuracy(before, name)["top1"]
    accuracy = {"top1_before_recovery": top1_before, **_accuracy(after, name)}
    return {**accuracy, **_costs(run, name), **_latencies(run, name)}


def _accuracy(evaluation: Any, name: str) -> dict[str, Any]:
    found = evaluation["models"][name] if evaluation and name in evaluation["models"] else {}
    return {key: found.get(key) for key in ("top1", "top5", "loss", "agreement")}


def _costs(run: Run, name: str | None) -> dict[str, int]:
    """Of the network that a plan and its masks leave; of the dense one for None."""
    if not _planned(run):
        return {}
    costs = run.plan("ours").dense if name is None else run.plan(name).kept
    found = {"params": costs.params, "macs": costs.macs}
    if name is not None and run.config.masks.pattern is None:
        found["nonzero_params"] = costs.params
    elif name is not None and (masks := _masks(run, name)):
        found["nonzero_params"] = masks["nonzero"]
    return found


def _masks(run: Run, name: str) -> dict[str, Any]:
    """What is told of the weight masks of a network; nothing where there are none, or none yet."""
    found: dict[str, Any] = (_read(run, "weight_masks.json") or {}).get(name, {})
    return found


def _planned(run: Run) -> bool:
    record = run.manifest.stages.get("plan")
    return record is not None and record.state == "done"


def _scope(run: Run, name: str) -> str | None:
    """In which what is removed competes: channels, or single weights where nothing is cut."""
    if not run.config.budget.given:
        return _masks(run, name).get("scope")
    return run.plan(name).scope if _planned(run) else None


def _plan(run: Run) -> dict[str, Any]:
    if not _planned(run):
        return {}
    plan, plans = run.plan("ours"), [one.plan("ours") for one in run.rounds]
    kept = {group.name: len(group.kept) for one in plans for group in one.groups}
    return {
        "sha256": plan.sha256(),
        "budget": plan.budget,
        "scope": plan.scope if plan.budget else None,
        "groups": [{"name": group.name, "size": group.size, "kept": kept[group.name]} for group in plans[0].groups],
        "removed_blocks": [block.name for one in plans for block in one.blocks],
        "num_blocks": len(run.first.graph().blocks) if run.config.budget.max_blocks else None,
    }


def _masks_sha256(run: Run) -> str | None:
    return masks_sha256(load_masks(run.path("masks.safetensors"))) if _planned(run) else None


def _stability(run: Run) -> dict[str, Any]:
    found = _read(run, "saliency", "stability.json") or {}
    error = found.get("relative_standard_error", {})
    curve = sorted(found.get("curve", []), key=lambda sample: sample["rows"])
    return {
        "rows": found.get("rows"),
        "curve": curve,
        "median_error": error.get("median"),
        "p90_error": error.get("p90"),
    }


def _weight_masks(run: Run) -> dict[str, Any]:
    found = _masks(run, "ours")
    figures = {key: found.get(key) for key in ("pattern", "criterion", "scope", "sha256", "kept", "weights")}
    return {**figures, "num_whole": len(found["whole"]) if found else None}


def _frozen(run: Run) -> list[dict[str, Any]]:
    if not artifacts.exists(run.path("graph.json")):
        return []
    return [
        {"group": f.group, "size": f.size, "operation": f.operation, "where": f.where, "reason": f.reason}
        for f in run.graph().frozen
    ]


def _latencies(run: Run, name: str) -> dict[str, dict[str, float]]:
    """By batch size; a control is not timed with ONNX Runtime."""
    files = {"latency_ms": "latency.json", "onnx_latency_ms": "onnx_latency.json"}
    batches = {key: (_read(run, file) or {}).get("batch", {}) for key, file in files.items()}
    return {
        key: {size: models[name]["median_ms"] for size, models in by_size.items() if name in models}
        for key, by_size in batches.items()
    }


def _saliency(run: Run) -> dict[str, Any]:
    found = _read(run, "saliency", "pass.json") or {}
    keys = ("rows", "units", "workers", "sha256", "seconds", "commits", "lost_workers", "resumed_units")
    values = {key: found.get(key) for key in keys}
    # A resumed pass has computed only what was left: its rate counts that part.
    share = 1 - found["resumed_units"] / found["units"] if found else None
    rate = found["rows"] * share / found["seconds"] if found and share else None
    deciding = plan_rules(run) if run.config.budget.given else mask_rules(run)
    return {
        "criterion": deciding["ours"].name,
        **values,
        "rows_per_s": rate,
        "skipped": len(found.get("bad_rows", [])),
    }


def _verify(run: Run) -> dict[str, Any]:
    ours = (_read(run, "verify.json") or {}).get("ours", {})
    return {"max_abs_diff": ours.get("max_abs"), "max_rel_diff": ours.get("max_rel"), "rows": ours.get("rows")}


def _training(run: Run, stage: str, epochs: int) -> dict[str, Any] | None:
    history = read_history(run.scratch("checkpoints", stage)) if stage in run.manifest.stages else []
    if not history:
        return None
    last = history[-1]
    return {"epochs": epochs, "seconds": last["seconds"], "rows_per_s": last["rows_per_s"], "history": history}


def _sparsify(run: Run) -> dict[str, Any] | None:
    settings = run.config.sparsify
    found = _training(run, "sparsify", settings.epochs) if settings.epochs else None
    return None if found is None else {"method": ", ".join(settings.method), **_with_zeros(run, "sparsify", found)}


def _recover(run: Run) -> dict[str, Any] | None:
    found = _training(run, "recover", run.config.recover.epochs)
    masked = found is not None and "zeros" in found["history"][-1]
    return _with_zeros(run, "recover", found) if found and masked else found


TRAINED = {"sparsify": ("sparse", None), "recover": ("ours-recovered", "ours")}
"""By stage: weights and plan of the network that it leaves."""


def _with_zeros(run: Run, stage: str, training: dict[str, Any]) -> dict[str, Any]:
    """How much of the network is zero: of what the stage has left, since gates and averages come in at the end; until then by its last
    record."""
    last = training["history"][-1]
    found: dict[str, Any] = {"zeros": last["zeros"], "near_zeros": None}
    shares: dict[str, list[float]] = last.get("layers", {})
    if run.manifest.stages[stage].state == "done":
        name, plan = TRAINED[stage]
        (zeros, near_zeros), shares = shares_of_zeros(dict(run.network(name, plan=plan).named_parameters()), {})
        found = {"zeros": zeros, "near_zeros": near_zeros}
    layers = [{"name": weight, "zeros": exact, "near_zeros": near} for weight, (exact, near) in shares.items()]
    history = [{key: value for key, value in record.items() if key != "layers"} for record in training["history"]]
    return {**training, **found, "layers": layers, "history": history}


def _forecast(run: Run) -> dict[str, Any]:
    """What was first foreseen of the run and of each stage, beside what it came to."""
    stored = _read(run, forecast.FILE)
    if stored is None:
        return {}
    found, records = Forecast.from_dict(stored), run.stages
    stages: list[dict[str, Any]] = []
    for stage in found.stages:
        record = records.get(stage.stage)
        done = record is not None and record.state == "done"
        if stage.first is None or (record and done and stage.first.made >= record.finished):
            continue
        seconds = record.seconds if record and done and record.attempts == 1 else None
        foreseen = {"forecast_seconds": stage.first.seconds, "share_done": stage.first.share_done}
        stages.append({"name": stage.stage, **foreseen, "seconds": seconds})
    figures = (
        {} if found.first is None else {key: getattr(found.first, key) for key in ("seconds", "worker_hours", "cost")}
    )
    whole = found.total if all(stage.done for stage in found.stages) else None
    if whole and all(record.attempts == 1 for record in records.values()):
        figures |= {f"used_{key}": getattr(whole, key) for key in ("seconds", "worker_hours", "cost")}
    return {**figures, "price_per_hour": found.price_per_hour, "stages": stages}


def _bad_rows(run: Run, before: Any) -> list[dict[str, Any]]:
    scored = (_read(run, "saliency", "pass.json") or {}).get("bad_rows", [])
    return [*scored, *(before or {}).get("bad_rows", [])]


def _per_class(before: Any, after: Any) -> list[dict[str, Any]]:
    if not before:
        return []
    dense = before["models"]["dense"]["class_accuracy"]
    pruned = (after or before)["models"]["ours"]["class_accuracy"]
    return [{"class": c, "dense": d, "pruned": p} for c, (d, p) in enumerate(zip(dense, pruned, strict=True))]
