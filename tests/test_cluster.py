"""cluster.yaml is what `ray up` takes, and its nodes get what the project needs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_rays_own_schema_accepts_it():
    validate_config(prepare_config(CLUSTER))


def test_every_dependency_is_installed_on_the_nodes():
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[\w-]+", one).group().lower() for one in needed} - {"ray"}  # which the image has
    assert names <= set(re.findall(r"[\w-]+", " ".join(CLUSTER["setup_commands"])))


def test_the_image_has_the_ray_that_the_project_asks_for():
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (lowest,) = [re.search(r">=([\d.]+)", one).group(1) for one in needed if one.startswith("ray[")]
    assert f":{lowest}." in CLUSTER["docker"]["image"]
