"""A job on three hosts, of which two are cut off from the network and come back: one while it scores, one while it trains. It ends with
the hashes of an undisturbed run on one machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import DataConfig, ScoreConfig
from tests.hosts import Hosts, NoHosts
from tests.nodes import wait_for
from tests.test_nodes import (
    RECOVER,
    TOP1_NOISE,
    hashes,
    newest_step,
    nodes_log,
    prepare,
    run_undisturbed,
    state,
    summary,
)
from tests.test_run import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3000)]

NUM_FILES = 3
"""Of 200 rows each: one worker scores them for longer than Ray takes to declare a host dead."""


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    try:
        with Hosts() as started:
            yield started
    except NoHosts as error:
        pytest.skip(str(error))


def write_files(directory: Path) -> DataConfig:
    directory.mkdir()
    first = write_rows(directory / "part-0.parquet")
    for i in range(1, NUM_FILES):
        shutil.copy(first, directory / f"part-{i}.parquet")
    return DataConfig(train=str(directory), val=first, image_size=64, crop_fraction=1.0)


def commits_of(run_dir: Path) -> Counter[str]:
    """First unit of each commit -> how many commits begin with it."""
    return Counter(path.name.split("-")[1] for path in run_dir.glob("units/score-*/commit-*"))


def stop_at_work(hosts: Hosts, name: str) -> int:
    """Stop a host's worker in the middle of a lease; returns its process."""
    while True:
        wait_for(lambda: hosts.processes(name, "_Actor.work"), f"{name} is at work")
        for pid in hosts.processes(name, "_Actor.work"):
            os.kill(pid, signal.SIGSTOP)
            if hosts.processes(name, "_Actor.work"):
                return pid
            os.kill(pid, signal.SIGCONT)


def test_a_job_outlives_hosts_that_are_cut_off_and_come_back(hosts: Hosts, tmp_path: Path):
    data = write_files(tmp_path / "rows")
    changes = {
        "data": data,
        "score": ScoreConfig(rows_per_unit=4, micro_batch=1),
        "recover": RECOVER.model_copy(update={"epochs": 6}),
    }
    run_undisturbed(prepare(data.train, tmp_path / "quiet", **changes))
    run_dir = tmp_path / "disturbed"
    command = prepare(data.train, run_dir, **changes)
    hosts.add("a")
    hosts.add("b")
    job = hosts.submit("job", command)
    told = hosts.log("job")

    def running() -> bool:
        assert job.poll() is None, told.read_text()[-3000:]
        return True

    try:
        wait_for(lambda: running() and commits_of(run_dir), "the first commit")
        late = stop_at_work(hosts, "a")
        hosts.cut("a")
        wait_for(lambda: running() and "\nworker w" in told.read_text(), "Ray declares a dead")
        assert state(run_dir, "score") == "running"
        before = commits_of(run_dir)
        wait_for(lambda: running() and commits_of(run_dir) - before, "b goes on with the pass")
        # Believed dead, it ends its lease, whose units have gone to another, and commits it to the storage that it still sees.
        os.kill(late, signal.SIGCONT)
        wait_for(lambda: running() and max(commits_of(run_dir).values()) > 1, "a unit is committed twice")
        hosts.mend("a")
        wait_for(lambda: running() and not hosts.processes("a"), "the old node ends itself")
        hosts.add("a")

        def training() -> bool:
            return all(hosts.processes(name, "RayTrainWorker") for name in "ab") and newest_step(run_dir) > 0

        wait_for(lambda: running() and training(), "both train", timeout_s=900)
        hosts.cut("b")
        last = newest_step(run_dir)
        wait_for(lambda: running() and newest_step(run_dir) > last + 3, "one worker trains on")
        hosts.mend("b")
        wait_for(lambda: running() and not hosts.processes("b"), "the old node ends itself")
        hosts.add("b")
        listed = hosts.ray("list", "nodes", "--format", "json").stdout
        assert job.wait(timeout=900) == 0, told.read_text()[-3000:]
    finally:
        job.kill()
        job.wait()
    nodes = Counter((node["node_ip"], node["state"]) for node in json.loads(listed[listed.index("[") :]))
    a, b = hosts.address("a"), hosts.address("b")
    assert nodes == {(hosts.address("head"), "ALIVE"): 1, **{(one, s): 1 for one in (a, b) for s in ("ALIVE", "DEAD")}}
    assert hashes(run_dir) == hashes(tmp_path / "quiet")
    end, expected = summary(run_dir), summary(tmp_path / "quiet")
    assert end["saliency"]["rows"] == expected["saliency"]["rows"] == 200 * NUM_FILES
    assert end["saliency"]["lost_workers"] > 0
    rejected = json.loads((run_dir / "saliency" / "pass.json").read_text())["rejected_commits"]
    assert "count already in an earlier commit" in rejected[0]
    assert abs(end["pruned"]["top1"] - expected["pruned"]["top1"]) <= TOP1_NOISE
    nodes_log(told.read_text())
