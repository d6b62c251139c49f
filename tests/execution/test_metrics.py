"""Figures for Prometheus: each counted where it happens, each in a panel of the dashboard."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from pipeline.execution import metrics
from pipeline.execution import pool as pools
from pipeline.execution.drive import run_pass
from pipeline.execution.pool import RayPool
from tests.execution.test_pool import Slow, a_pass

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana.json").read_text())


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_every_figure_is_in_a_panel_and_every_panel_shows_one_that_there_is():
    shown = [re.findall(r"ray_\w+", expression) for expression in expressions()]
    assert all(shown)
    assert {name for names in shown for name in names} == {metrics.exported(name) for name in metrics.DESCRIPTIONS}


def test_every_panel_asks_the_source_that_the_reader_chooses():
    variables = {one["name"]: one for one in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    sources = [one["datasource"]["uid"] for panel in DASHBOARD["panels"] for one in (panel, *panel["targets"])]
    assert {*sources, variables["session"]["datasource"]["uid"]} == {"${datasource}"}
    assert {name for text in expressions() for name in re.findall(r"\$([a-z]+)", text)} <= {*variables}


def test_panels_do_not_lie_on_each_other():
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not taken & cells
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_documentation_names_each_figure():
    part = (
        (ROOT / "docs" / "observability.md")
        .read_text()
        .split("<!-- figures -->")[1]
        .split("<!-- end of figures -->")[0]
    )
    told = dict(re.findall(r"\| `(\w+)` \| (.+) \|", part))
    assert told == {metrics.exported(name): text for name, text in metrics.DESCRIPTIONS.items()}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the process has counted, without Ray."""
    found: dict[str, float] = {}

    def made(name: str, kind: object) -> SimpleNamespace:
        def add(value: float) -> None:
            assert value > 0  # or Ray refuses it
            found[name] = found.get(name, 0) + value

        return SimpleNamespace(inc=add)

    monkeypatch.setattr(metrics, "_metric", made)
    return found


def test_nothing_is_added_where_there_is_nothing(counted: dict[str, float]):
    metrics.count("pruning_rows", 0)
    metrics.count("pruning_rows", 3)
    assert counted == {"pruning_rows": 3}


def test_a_worker_that_dies_with_a_lease_counts_and_one_without_does_not(
    counted: dict[str, float], monkeypatch: pytest.MonkeyPatch
):
    def dead(reference: object) -> None:
        raise RayActorError()

    monkeypatch.setattr(pools.ray, "get", dead)
    monkeypatch.setattr(pools.ray, "kill", lambda actor, no_restart: None)
    pool = RayPool(0, "cpu", 1)
    for worker, lease in (("w0", 0), ("w1", 5), ("w2", 6)):
        pool._pending[worker] = (worker, lease)
        pool._event(worker)
    assert counted == {"pruning_lost_leases": 2}


@pytest.mark.ray
@pytest.mark.slow
def test_what_workers_count_arrives_at_rays_agent(ray_cluster: None, tmp_path: Path):
    import ray

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {metrics.exported(name) for name in ("pruning_rows", "pruning_units", "pruning_commits")}
    pool = RayPool(1, "cpu", 1)
    try:
        run_pass(a_pass(tmp_path, Slow()), pool, commit_interval_s=0.1)
        deadline, found = time.monotonic() + 60, set()
        while not wanted <= found and time.monotonic() < deadline:
            text = urllib.request.urlopen(address, timeout=10).read().decode()
            found = {line.split("{")[0] for line in text.splitlines() if line.startswith("ray_pruning")}
            time.sleep(0.5)
    finally:
        pool.close()
    assert wanted <= found
