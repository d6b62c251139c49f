"""Configuration: what does not fit is named with its field, its value and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import prune_demo, prune_imagenette, prune_resnet152
from pipeline import cli, config
from pipeline.config import ConfigError, RunConfig

VALUES = {"budget": {"params": 0.5}}


DEFAULTS = {
    "demo": prune_demo.config("train.parquet", "val.parquet"),
    "imagenette": prune_imagenette.config(),
    "resnet152": prune_resnet152.config(),
}


@pytest.mark.parametrize("job", DEFAULTS)
def test_each_jobs_defaults_come_back_from_yaml(job: str, tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(DEFAULTS[job].to_yaml())
    assert config.load(str(path)) == DEFAULTS[job]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"budget": {}}, ["budget.params or budget.macs", "masks.pattern"]),
        ({"budget": {"max_blocks": 0.3}, "masks": {"pattern": "2:4"}}, ["budget.max_blocks (0.3)", "there is none"]),
        ({**VALUES, "masks": {"pattern": "2:4", "share": 1.0}}, ["masks.share = 1.0", "less than 1"]),
        (
            {**VALUES, "masks": {"pattern": 124}},
            ["masks.pattern", "YAML makes of a pattern like 2:4", 'pattern: "2:4"'],
        ),
        ({**VALUES, "score": {"criterion": []}}, ["score.criterion", "at least 1 item"]),
        ({"budget": {"params": 0}}, ["budget.params (0.0)", "between 0 and 1", "--budget.params 0.5"]),
        ({"budget": {"macs": 1.5}}, ["budget.macs (1.5)", "between 0 and 1"]),
        ({"budget": {"params": 0.5, "macs": 0.5}}, ["params (0.5) and macs (0.5) are both given"]),
        ({**VALUES, "bugdet": {}}, ["bugdet: there is no such field", "Did you mean budget?"]),
        ({**VALUES, "data": {"image_sise": 64}}, ["data.image_sise", "Did you mean image_size?"]),
        ({**VALUES, "data": {"image_size": "big"}}, ["data.image_size = 'big'", "--data.image_size VALUE"]),
        ({**VALUES, "recover": {"epochs": 3, "batch_size": 30, "num_streams": 4}}, ["batch_size (30)", "(4)"]),
        ({**VALUES, "recover": {"epochs": 1, "warmup_epochs": 2}}, ["recover.warmup_epochs (2.0)", "epochs (1)"]),
        (
            {**VALUES, "recover": {"epochs": 3, "rewind_epochs": 2}},
            ["recover.rewind_epochs (2.0)", "epochs (3)", "Raise it"],
        ),
        ({**VALUES, "sparsify": {"method": "rigl"}}, ["sparsify.epochs (0)", "method (rigl)", "Give both"]),
        ({**VALUES, "sparsify": {"epochs": 3}}, ["sparsify.epochs (3)", "method (none)", "Give both"]),
        (
            {**VALUES, "sparsify": {"epochs": 3, "method": "l1_prox, rigl", "strength": 0.1}},
            ["sparsify.strength [0.1]", "method ['l1_prox', 'rigl']", "one number for each"],
        ),
        ({**VALUES, "recover": {"lr": 1e-6}}, ["recover.min_lr (1e-05)", "lr (1e-06)"]),
        ({**VALUES, "score": {"rows_per_unit": 8, "micro_batch": 16}}, ["micro_batch (16)", "rows_per_unit (8)"]),
    ],
)
def test_what_does_not_fit_is_named(values, words):
    with pytest.raises(ConfigError) as error:
        config.parse(values)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_command_line_overrides_single_fields_and_one_budget_replaces_the_other():
    default = RunConfig.model_validate({"budget": {"params": 0.5}})
    parsed = cli.parse(default, ["--budget.macs", "0.7", "--data.image-size", "64", "--score.num-rows", "None"])
    assert (parsed.budget.macs, parsed.budget.params) == (0.7, None)
    assert (parsed.data.image_size, parsed.score.num_rows) == (64, None)


def test_weights_can_be_masked_where_nothing_is_cut():
    parsed = cli.parse(RunConfig(**VALUES), ["--budget.params", "None", "--masks.pattern", "2:4"])
    assert (parsed.budget.given, parsed.masks.pattern) == (False, "2:4")


def test_a_yaml_file_replaces_the_defaults_and_the_command_line_wins(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("budget: {params: 0.25}\nseed: 7\n")
    parsed = cli.parse(prune_resnet152.config(), ["--config", str(path), "--seed", "8"])
    assert (parsed.budget.params, parsed.seed, parsed.recover.epochs) == (0.25, 8, 3)


def test_a_yaml_file_that_holds_no_mapping_is_named(tmp_path: Path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"list\.yaml holds no mapping"):
        config.load(str(tmp_path / "list.yaml"))


def test_a_name_or_a_number_stands_for_a_list_of_one():
    values = {"score": {"criterion": "taylor, fisher", "criterion_weights": [3, 1]}, "controls": {"criteria": "random"}}
    parsed = config.parse({**VALUES, **values})
    assert parsed.score.criterion == ("taylor", "fisher")
    assert parsed.controls.criteria == ("random",)
    assert config.parse({**VALUES, "masks": {"criterion_weights": 0.5}}).masks.criterion_weights == (0.5,)
