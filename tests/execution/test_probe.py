"""Nodes are asked before the first stage: one error names node, path and the way out, and nothing is left behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import NodeDiedError

from pipeline.data.rows import Source, open_source
from pipeline.execution import probe
from pipeline.execution.probe import UnfitNodes, probe_nodes
from tests.data.making import write_rows

pytestmark = pytest.mark.ray

Look = Callable[..., list[tuple[str, str]]]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    for name in ("a", "b", "c"):
        write_rows(tmp_path / "rows" / f"{name}.parquet", 8)
    return open_source(str(tmp_path / "rows"))


@pytest.fixture
def foreign(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only node of the session's Ray, as if the driver were elsewhere."""
    monkeypatch.setattr(probe, "_own_node", lambda: "elsewhere")


def ask(tmp_path: Path, *sources: Source, **resources: Any) -> int:
    (tmp_path / "run").mkdir(exist_ok=True)
    try:
        return probe_nodes(str(tmp_path / "run"), sources, **{"device": "cpu", "threads": 1, **resources})
    finally:
        assert list((tmp_path / "run").iterdir()) == []


def test_one_machine_is_not_asked(ray_cluster: None, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe, "_ask", None)  # whoever calls it fails
    assert ask(tmp_path, source) == 0


def test_a_fit_node_answers(foreign: None, source: Source, tmp_path: Path):
    assert ask(tmp_path, source) == 1


@pytest.mark.parametrize("resources", [{"threads": 64}, {"device": "cuda"}])
def test_a_node_without_room_for_a_worker_is_not_asked(foreign: None, tmp_path: Path, resources: dict[str, Any]):
    assert ask(tmp_path, **resources) == 0


def elsewhere(look: Look) -> Look:
    """A node where the run directory is another one."""
    return lambda question, *rest: look(f"{question}-of-another-disk", *rest)


def copied(look: Look) -> Look:
    """A node that sees a copy of the run directory: what it writes does not come back."""
    return lambda question, token, answer, *rest: look(question, token, answer.replace("/run/", "/copy/"), *rest)


def old_torch(look: Look) -> Look:
    return lambda question, token, answer, files, versions: look(
        question, token, answer, files, {**versions, "torch": "1.0.0"}
    )


def dies(look: Look) -> Look:
    del look
    return lambda *question: os._exit(1)


@pytest.mark.parametrize(
    ("disturbance", "words"),
    [
        (
            elsewhere,
            r"cannot read .*-of-another-disk: No such file or directory\. Choose a --run-dir on storage that all",
        ),
        (copied, r"what it writes to .*/run/probe-\w+-\w{16} does not arrive here\. Choose a --run-dir"),
        (old_torch, r"torch \d+\.\d+\.\d+ there, 1\.0\.0 here\. Give all nodes one image"),
        (dies, r"a task fails there: .*\. Give all nodes one image .* or submit the job with --working-dir"),
    ],
)
def test_one_error_names_the_node_what_is_wrong_and_the_way_out(
    foreign: None, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disturbance: Any, words: str
):
    look = probe._look()
    monkeypatch.setattr(probe, "_look", lambda: disturbance(look))
    host = os.uname().nodename
    with pytest.raises(
        UnfitNodes, match=rf"1 of 1 nodes cannot take part in this run\.\n  {host} \(\w{{8}}\): {words}"
    ):
        ask(tmp_path, source)


def test_data_that_a_node_does_not_have_is_named_with_its_path(foreign: None, source: Source, tmp_path: Path):
    (tmp_path / "rows" / "a.parquet").unlink()
    with (tmp_path / "rows" / "c.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UnfitNodes) as raised:
        ask(tmp_path, source)
    missing, changed = str(raised.value).splitlines()[1:]
    assert f"{tmp_path}/rows/a.parquet cannot be opened: " in missing
    assert "Put the data on storage that all nodes share" in missing
    size = (tmp_path / "rows" / "c.parquet").stat().st_size
    assert f"{tmp_path}/rows/c.parquet has {size} bytes there, {size - 1} here" in changed


def test_a_node_whose_mount_hangs_is_named(
    foreign: None, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def hangs(*question: object) -> None:
        import time

        time.sleep(60)

    monkeypatch.setattr(probe, "_look", lambda: hangs)
    monkeypatch.setattr(probe, "TIMEOUT_S", 0.5)
    with pytest.raises(UnfitNodes, match=r"no answer within 0 s\. Look at its mounts"):
        ask(tmp_path, source)


def test_a_node_that_dies_while_it_is_asked_is_gone_and_not_unfit(
    foreign: None, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Though the cluster's list of nodes still has it as alive."""

    def died(reference: object) -> None:
        raise NodeDiedError("Task failed because the node it was running on is dead or unavailable.")

    monkeypatch.setattr(probe.ray, "get", died)
    assert ask(tmp_path, source) == 0


def test_equal_faults_are_told_once_with_the_first_nodes():
    nodes = {f"{i:016x}": {"NodeManagerHostname": f"gpu-{i}"} for i in range(5)}
    faults = {node: [("run", "/runs is read-only")] for node in nodes} | {"0" * 16: []}
    text = probe._message(nodes, faults)
    assert text.count("/runs is read-only") == 1
    assert text.startswith("4 of 5 nodes")
    assert "gpu-1 (00000000), gpu-2 (00000000), gpu-3 (00000000) and 1 more: " in text
