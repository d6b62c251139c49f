"""summary.json: stable keys, nulls instead of zeros, errors that name the key."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.report.numbers import batch_sizes, complete, from_json, networks, to_json
from tests.report.samples import SAMPLES, digits, sparse

GOLDEN = {
    "model": None,
    "dense": {"top1", "top5", "loss", "agreement", "params", "macs", "latency_ms", "onnx_latency_ms"},
    "sparse": {"top1", "top5", "loss", "agreement"},
    "pruned": {
        "top1_before_recovery", "top1", "top5", "loss", "agreement", "params", "macs", "nonzero_params",
        "latency_ms", "onnx_latency_ms",
    },
    "controls": {"random", "magnitude"},
    "rounds": None,
    "saliency": {
        "criterion", "rows", "units", "workers", "sha256", "seconds", "rows_per_s", "skipped",
        "commits", "lost_workers", "resumed_units",
    },
    "plan": {"sha256", "budget", "scope", "groups", "num_blocks", "removed_blocks"},
    "masks": {"sha256"},
    "stability": {"rows", "curve", "median_error", "p90_error"},
    "weight_masks": {"pattern", "criterion", "scope", "sha256", "kept", "weights", "num_whole"},
    "compression": {
        "rows", "calibration_rows", "weight_bits", "runtime", "threads", "runs", "sha256", "dense", "cut", "cut_int8",
    },
    "verify": {"max_abs_diff", "max_rel_diff", "rows"},
    "frozen": None,
    "train": {"epochs", "seconds", "rows_per_s", "history"},
    "sparsify": None,
    "recover": {"epochs", "seconds", "rows_per_s", "history", "zeros", "near_zeros", "layers"},
    "stages": None,
    "forecast": {
        "seconds", "worker_hours", "cost", "used_seconds", "used_worker_hours", "used_cost", "price_per_hour", "stages",
    },
    "bad_rows": None,
    "per_class": None,
    "data": {"train", "val", "val_rows"},
    "environment": {"command", "python", "device", "cpus"},
}  # fmt: skip


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for one in value.values() for leaf in leaves(one)]
    return [value]


def test_an_empty_summary_has_every_key():
    summary = complete({})
    assert {key: set(part) if isinstance(part, dict) else None for key, part in summary.items()} == GOLDEN


def test_what_was_not_measured_is_null_and_never_zero():
    assert [leaf for leaf in leaves(complete({})) if leaf not in (None, [], {})] == []


@pytest.mark.parametrize("part", [*GOLDEN])
def test_a_null_part_reads_like_a_missing_one(part):
    assert complete({part: None}) == complete({})


@pytest.mark.parametrize("name", [*SAMPLES])
def test_json_there_and_back(name):
    summary = complete(SAMPLES[name]())
    assert from_json(to_json(summary)) == summary
    assert complete(summary) == summary


def test_the_given_summary_stays_as_it_was():
    given = sparse()
    complete(given)
    assert given == sparse()


def test_json_has_no_nan():
    summary = from_json(to_json({"recover": {"history": [{"step": 1, "loss": float("nan")}]}}))
    assert summary["recover"]["history"] == [{"step": 1, "epoch": None, "loss": None, "lr": None}]
    assert json.loads(to_json({"verify": {"max_abs_diff": float("inf")}}))["verify"]["max_abs_diff"] is None


def test_unknown_keys_stay():
    assert complete({"fingerprints": {"graph": "ab"}, "dense": {"flips": 3}})["dense"]["flips"] == 3  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"dense": {"top1": 96.7}}, r"dense\.top1 is 96\.7; accuracies are fractions"),
        ({"dense": {"params": "4.9 M"}}, r"dense\.params is '4\.9 M'; it is a number"),
        ({"controls": {"random": {"top1_before_recovery": -0.1}}}, r"controls\.random\.top1_before_recovery is -0\.1"),
        ({"dense": 3}, r"dense is 3; it is a mapping"),
        ({"pruned": {"onnx_latency_ms": {"1": "fast"}}}, r"onnx_latency_ms\.1 is 'fast'; it is a number"),
        ({"compression": {"cut": {"bytes": "1 MB"}}}, r"compression\.cut\.bytes is '1 MB'; it is a number"),
        ({"compression": {"cut_int8": {"top1": 94}}}, r"compression\.cut_int8\.top1 is 94; accuracies are fractions"),
        ({"stages": {"score": 1}}, r"stages is .*; it is a list"),
        ({"plan": {"groups": [{"name": "a", "size": 4, "kept": 5}]}}, r"0 <= kept <= size"),
        ({"sparsify": {"method": 3}}, r"sparsify\.method is 3; it is text"),
        ({"sparsify": {"layers": {}}}, r"sparsify\.layers is \{\}; it is a list"),
        ({"plan": {"sha256": 12}}, r"plan\.sha256 is 12; it is text"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(wrong, words):
    with pytest.raises(ValueError, match=words):
        complete(wrong)


def test_networks_stand_in_one_order_with_ours_last():
    given = digits()
    given["controls"] = {"l1": {"params": 7}, "magnitude": {"params": 8}, "random": {"params": 9}}
    assert [n.name for n in networks(complete(given))] == ["dense", "random", "magnitude", "l1", "ours (taylor)"]


def test_a_control_that_was_switched_off_is_no_column():
    assert [n.name for n in networks(complete(sparse()))] == ["dense", "ours (magnitude)"]


def test_batch_sizes_are_in_the_order_of_numbers():
    assert batch_sizes(complete({"dense": {"latency_ms": {"128": 1.0, "32": 1.0, "8": 1.0, "1": None}}})) == [
        "8",
        "32",
        "128",
    ]
