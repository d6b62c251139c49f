"""The files for clusters: `ray up` and KubeRay take them, their image has what the project needs, and a job uploads its code alone."""

from __future__ import annotations

import re
import shutil
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
JOB = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())
DOCKERFILE = [line.split(maxsplit=1) for line in (ROOT / "deploy" / "Dockerfile").read_text().splitlines() if line]

UPLOAD_LIMIT = 100 * 2**20
"""Bytes that Ray's dashboard takes from a client: its DASHBOARD_CLIENT_MAX_SIZE."""

# --- cluster.yaml -----------------------------------------------------------------------------------------------------


def offered_providers() -> dict[str, Any]:
    """What the comments say to write in place of the provider."""
    found = re.findall(r"^# (.+?): +(\{type: .+?\})(?:,.*)?$", (ROOT / "cluster.yaml").read_text(), re.MULTILINE)
    return {name: yaml.safe_load(value) for name, value in found}


def test_rays_own_schema_accepts_it():
    validate_config(prepare_config(CLUSTER))


def test_rays_own_schema_accepts_what_the_comments_offer():
    providers = offered_providers()
    assert [provider["type"] for provider in providers.values()] == ["gcp", "local"]
    of_the_cloud = ("available_node_types", "head_node_type", "max_workers", "idle_timeout_minutes")
    for provider in providers.values():
        leave_out = of_the_cloud if provider["type"] == "local" else ()
        rest = {name: value for name, value in CLUSTER.items() if name not in leave_out}
        validate_config(prepare_config({**rest, "provider": provider}))


def test_the_head_does_no_work_and_stays_and_the_workers_are_spot():
    head, worker = (CLUSTER["available_node_types"][name] for name in ("head", "gpu_worker"))
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert worker["min_workers"] < worker["max_workers"] <= CLUSTER["max_workers"]
    assert CLUSTER["idle_timeout_minutes"] > 0
    assert head["node_config"]["IamInstanceProfile"] == worker["node_config"]["IamInstanceProfile"]  # the same bucket


def test_every_node_has_the_token_and_asks_for_it():
    assert CLUSTER["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert "--env=RAY_AUTH_MODE=token" in CLUSTER["docker"]["run_options"]
    assert JOB["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


# --- the image --------------------------------------------------------------------------------------------------------


def test_the_image_has_the_ray_and_the_python_that_the_project_asks_for():
    (base,) = [value for name, value in DOCKERFILE if name == "ARG"]
    ray, python = re.fullmatch(r"BASE=rayproject/ray:(\d+\.\d+)\.\d+-py3(\d+)-gpu", base).groups()
    (wanted,) = [re.search(r">=([\d.]+)", one).group(1) for one in PROJECT["dependencies"] if one.startswith("ray[")]
    assert ray == wanted
    assert int(python) >= int(re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"]).group(1))


def test_the_image_installs_the_project_from_files_that_exist():
    installs = [value for name, value in DOCKERFILE if name == "RUN"]
    assert len(installs) == 2
    extras = re.search(r"pip install --no-cache-dir \"\.\[([\w,]+)\]\"", installs[0]).group(1).split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    assert "--no-deps" in installs[1].split()
    copies = [value.split() for name, value in DOCKERFILE if name == "COPY"]
    sources = {source for _, *sources, _ in copies for source in sources}
    assert sources == {"pyproject.toml", "README.md", "pipeline", "jobs"}
    assert all((ROOT / source).exists() for source in sources)
    # The first installation has the dependencies alone: the code comes after it.
    order = [name for name, _ in DOCKERFILE if name in ("COPY", "RUN")]
    assert order == ["COPY", "RUN", "COPY", "COPY", "RUN"]


def pods() -> dict[str, dict[str, Any]]:
    cluster = JOB["spec"]["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"], **{one["groupName"]: one for one in cluster["workerGroupSpecs"]}}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def test_all_nodes_have_one_image():
    images = {container["image"] for pod in pods().values() for container in pod["containers"]}
    assert images == {CLUSTER["docker"]["image"]}
    (version,) = {image.rpartition(":")[2] for image in images}
    assert JOB["spec"]["rayClusterSpec"]["rayVersion"] == version


# --- KubeRay ----------------------------------------------------------------------------------------------------------

FIELDS: dict[str, dict[str, type]] = {
    "RayJobSpec": {
        "activeDeadlineSeconds": int,
        "backoffLimit": int,
        "clusterSelector": dict,
        "entrypoint": str,
        "entrypointNumCpus": float,
        "entrypointNumGpus": float,
        "entrypointResources": str,
        "jobId": str,
        "metadata": dict,
        "rayClusterSpec": dict,
        "runtimeEnvYAML": str,
        "shutdownAfterJobFinishes": bool,
        "submissionMode": str,
        "submitterConfig": dict,
        "submitterPodTemplate": dict,
        "suspend": bool,
        "ttlSecondsAfterFinished": int,
    },
    "SubmitterConfig": {"backoffLimit": int},
    "RayClusterSpec": {
        "authOptions": dict,
        "autoscalerOptions": dict,
        "enableInTreeAutoscaling": bool,
        "gcsFaultToleranceOptions": dict,
        "headGroupSpec": dict,
        "headServiceAnnotations": dict,
        "rayVersion": str,
        "suspend": bool,
        "workerGroupSpecs": list,
    },
    "AutoscalerOptions": {"idleTimeoutSeconds": int, "resources": dict, "upscalingMode": str, "version": str},
    "HeadGroupSpec": {"headService": dict, "rayStartParams": dict, "serviceType": str, "template": dict},
    "WorkerGroupSpec": {
        "groupName": str,
        "idleTimeoutSeconds": int,
        "maxReplicas": int,
        "minReplicas": int,
        "numOfHosts": int,
        "rayStartParams": dict,
        "replicas": int,
        "template": dict,
    },
}
"""Of the definitions of ray.io/v1, as the reference of KubeRay lists them."""


def wrong_fields(kind: str, value: dict[str, Any]) -> list[str]:
    known = FIELDS[kind]
    unknown = [f"{kind}.{name} is unknown" for name in value if name not in known]
    return unknown + [
        f"{kind}.{name} is no {known[name].__name__}"
        for name, one in value.items()
        if name in known and type(one) is not known[name]
    ]


def test_the_job_has_the_fields_that_kuberay_knows():
    spec = JOB["spec"]
    cluster = spec["rayClusterSpec"]
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9-]{1,47}", JOB["metadata"]["name"])  # the names of the pods are made from it
    assert wrong_fields("RayJobSpec", spec) == []
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    assert wrong_fields("SubmitterConfig", spec["submitterConfig"]) == []
    assert wrong_fields("RayClusterSpec", cluster) == []
    assert wrong_fields("AutoscalerOptions", cluster["autoscalerOptions"]) == []
    assert wrong_fields("HeadGroupSpec", cluster["headGroupSpec"]) == []
    for group in cluster["workerGroupSpecs"]:
        assert wrong_fields("WorkerGroupSpec", group) == []
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(isinstance(value, str) for group in groups for value in group["rayStartParams"].values())


def test_a_pod_mounts_what_it_has_and_all_share_the_storage_of_the_run():
    for pod in pods().values():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for one in pod["containers"] for mount in one["volumeMounts"]}
        assert set(mounts.values()) <= set(volumes)
        assert volumes[mounts["/shared"]]["persistentVolumeClaim"] == {"claimName": "CLAIM"}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    words = JOB["spec"]["entrypoint"].split()
    paths = [words[words.index(field) + 1] for field in ("--data.train", "--data.val", "--run-dir")]
    assert all(path.startswith("/shared/") for path in paths)
    assert JOB["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert JOB["spec"]["backoffLimit"] > 0


@pytest.mark.parametrize("module", [JOB["spec"]["entrypoint"].split()[2]])
def test_the_command_of_the_job_exists(module: str):
    assert (ROOT / f"{module.replace('.', '/')}.py").exists()


# --- what a job uploads -----------------------------------------------------------------------------------------------


def uploaded(directory: Path, target: Path) -> zipfile.ZipFile:
    """What `ray job submit --working-dir` makes of a directory."""
    create_package(str(directory), target, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    return zipfile.ZipFile(target)


NOT_UPLOADED = [
    ".git/objects/pack/all.pack",
    ".venv/lib/python3.11/site-packages/torch/lib/libtorch.so",
    ".mypy_cache/3.11/torch.data.json",
    ".hypothesis/examples/a",
    "pipeline/__pycache__/config.cpython-311.pyc",
    "data/train-00000-of-00100.parquet",
    "runs/resnet152/networks/dense.safetensors",
    "runs/resnet152/config.yaml",
    "elsewhere/rows.parquet",
    "resnet152.pt",
]
UPLOADED = [
    "pipeline/data/rows.py",
    "pipeline/report/page.css",
    "pipeline/report/page.html.j2",
    "jobs/prune_resnet152.py",
    "benchmarks/resnet152_64px.yaml",
    "own_network.py",
]


def test_data_runs_and_caches_stay_and_the_code_goes(tmp_path: Path):
    here = tmp_path / "here"
    for name in NOT_UPLOADED + UPLOADED:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("x")
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, here / name)
    names = set(uploaded(here, tmp_path / "code.zip").namelist())
    assert names & set(NOT_UPLOADED) == set()
    assert set(UPLOADED) <= names


def test_the_upload_of_this_repository_has_all_of_its_code_and_is_small(tmp_path: Path):
    package = uploaded(ROOT, tmp_path / "code.zip")
    code = [path for folder in ("pipeline", "jobs") for path in (ROOT / folder).rglob("*") if path.is_file()]
    needed = {str(path.relative_to(ROOT)) for path in code if "__pycache__" not in path.parts}
    assert needed <= set(package.namelist())
    assert (tmp_path / "code.zip").stat().st_size < UPLOAD_LIMIT / 10  # nobody should have to think of the limit
