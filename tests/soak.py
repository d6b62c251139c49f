"""A whole cluster and a saboteur: a head, worker nodes, jobs through the job server, and every 20 seconds on average a SIGKILL.

Runs of one small job follow one another, each in a directory of its own. The saboteur kills a worker (an actor of a pass over the
data, or a process of Ray Train), a node with all its processes, or the driver. Another node comes a little later, as an autoscaler
would bring it; a job that has ended is submitted again under another id, as a user would. Each run must end with the saliency, the plan and
the masks of an undisturbed run, have each row once in every pass, and train to the same accuracy, but for noise.

The seed fixes the waits and the order of kinds; what is hit, and in the middle of what, is left to the machine.
`python -m tests.soak --minutes 30` ends with exit code 1 at the first run that is wrong, and names its directory, which then stays; also when
a job has ended with an error that is none of deaths.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import ControlsConfig, DataConfig, ScoreConfig, TrainingConfig, WorkersConfig
from pipeline.execution.ledger import Reading, StoredCommit, accept
from pipeline.training import checkpoint
from tests.nodes import Nodes
from tests.test_run import config, write_rows

EVERY_S = 20.0
"""Mean of the waits between two deaths."""
DECK = ("worker", "worker", "worker", "node", "driver")
"""Kinds of five deaths; each five are shuffled anew."""
NUM_WORKERS = 2
NUM_NODES = 3
"""One more than workers, so that a run whose node has gone has somewhere to go on."""
NEW_NODE_S = (2.0, 8.0)
"""Until a new node is started in place of one that was killed; it takes as long again to come up."""
AGAIN_S = 3.0
"""Mean of the wait after a draw that found nobody to kill."""
LOOK_S = 0.2
STUCK_S = 900.0
"""A run that leaves nothing new in its directory for so long hangs."""
CHECKPOINT_EVERY_STEPS = 3
TOP1_NOISE = 0.1
"""The training goes on with one worker of two for a while: its batch norms see other rows, and 200 rows are 20 in a tenth."""
JOB = "jobs.prune_resnet152"
WORKERS = ("ray::_Actor", "ray::RayTrainWorker")
"""Command lines of those that compute."""
TOO_MANY = re.compile(r"^(TrainingFailed|PassFailed): .*", re.MULTILINE)
"""How a job says that it gives up: more deaths without any progress than workers.max_failures allows."""
LOST = re.compile(r"^worker w\d+: ", re.MULTILINE)
"""What a driver says of each worker that it loses in a pass over the data."""
SAID_AGAIN = "Status message: "
"""After this `ray job submit` shows the end of a failed job's log once more."""


# --- the job ----------------------------------------------------------------------------------------------------------


def prepare(rows: Path, run_dir: Path) -> list[str]:
    """The command of a run with commits and checkpoints that are near enough to one another for such a cluster."""
    run_dir.mkdir()
    given = config(
        str(rows),
        run_dir,
        data=DataConfig(train=str(rows), val=str(rows / "0.parquet"), image_size=96, crop_fraction=1.0),
        score=ScoreConfig(rows_per_unit=4, micro_batch=4),
        controls=ControlsConfig(criteria=("random",)),
        recover=TrainingConfig(
            epochs=1,
            batch_size=20,
            num_streams=NUM_WORKERS,
            lr=0.01,
            warmup_epochs=0,
            checkpoint_every_steps=CHECKPOINT_EVERY_STEPS,
        ),
        workers=WorkersConfig(num_workers=NUM_WORKERS, commit_interval_s=0.2, max_failures=10),
        quiet=False,
    )
    (run_dir / "given.yaml").write_text(given.to_yaml())
    return [sys.executable, "-m", JOB, "--config", str(run_dir / "given.yaml")]


def write_data(directory: Path) -> Path:
    """800 rows to score and to train with, of which 200 are evaluated."""
    directory.mkdir()
    for i in range(4):
        write_rows(directory / f"{i}.parquet")
    return directory


def stages(run_dir: Path) -> dict[str, str]:
    """State of each stage that has begun."""
    manifest = run_dir / "manifest.json"
    records = json.loads(manifest.read_text()) if manifest.exists() else {}
    return {name: record["state"] for name, record in records.items()}


def progress(run_dir: Path) -> tuple[int, int, int]:
    """Stages that are done, commits, and the newest checkpoint: one of them grows when a run gets on."""
    done = sum(state == "done" for state in stages(run_dir).values())
    places = (run_dir / "checkpoints").glob("*")
    newest = max((step for place in places for step in checkpoint.steps_in(str(place))), default=0)
    return done, len(list(run_dir.glob("units/*/commit-*"))), newest


# --- what it must end with --------------------------------------------------------------------------------------------


def passes(run_dir: Path) -> dict[str, Reading]:
    """What counts of each pass over the data."""
    found = {}
    for place in (run_dir / "units").iterdir():
        every = commits(place)
        found[place.name.rpartition("-")[0]] = accept(every, 1 + max(int(one.units.max()) for one in every))
    return found


def rows_redone(run_dir: Path) -> int:
    """Rows in all commits, less those that count."""
    every = sum(one.rows for place in (run_dir / "units").iterdir() for one in commits(place))
    return every - sum(reading.rows for reading in passes(run_dir).values())


def largest_commit(run_dir: Path) -> int:
    """Its rows."""
    return max(one.rows for place in (run_dir / "units").iterdir() for one in commits(place))


def commits(place: Path) -> list[StoredCommit]:
    """Of one pass, in the order in which they are accepted."""
    paths = sorted(place.glob("commit-*"))
    return [StoredCommit.open(str(path), path.name, path.stat().st_size) for path in paths]


def require_equal(run_dir: Path, undisturbed: Path) -> None:
    found, expected = (json.loads((one / "report" / "summary.json").read_text()) for one in (run_dir, undisturbed))
    for name in ("saliency", "plan", "masks"):
        hashes = found[name]["sha256"], expected[name]["sha256"]
        assert hashes[0] == hashes[1], f"{name}: sha256 {hashes[0]}, undisturbed {hashes[1]}"
    assert found["saliency"]["rows"] == expected["saliency"]["rows"] == 800, f"{found['saliency']['rows']} rows"
    ours, quiet = passes(run_dir), passes(undisturbed)
    assert ours.keys() == quiet.keys(), f"passes {[*ours]}, undisturbed {[*quiet]}"
    for name, reading in ours.items():
        assert len(reading.covered) == len(quiet[name].covered), f"{name}: {len(reading.covered)} units"
        assert not reading.missing, f"{name}: units {reading.missing} are lost"
        assert reading.rows == quiet[name].rows, f"{name}: {reading.rows} rows, undisturbed {quiet[name].rows}"
    before, after = ((one["pruned"]["top1_before_recovery"], one["pruned"]["top1"]) for one in (found, expected))
    assert before[0] == after[0], f"top-1 before recovery {before[0]}, undisturbed {after[0]}"
    assert abs(before[1] - after[1]) <= TOP1_NOISE, f"top-1 {before[1]}, undisturbed {after[1]}"


# --- what happened ----------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    runs: int = 0
    """Disturbed ones that are complete."""
    seconds: float = 0.0
    """Of all disturbed runs, from the first submission to the end."""
    workers_killed: int = 0
    """Actors of passes over the data, and processes of Ray Train."""
    nodes_killed: int = 0
    drivers_killed: int = 0
    submitted_again_after_a_killed_driver: int = 0
    submitted_again_after_too_many_deaths: int = 0
    """Jobs that gave up: see workers.max_failures."""
    submitted_again_after_another_error: int = 0
    lost_leases: int = 0
    """Workers that a driver lost in a pass over the data, as it says; those that ended with their driver are not among them."""
    rows_counted: int = 0
    """Over all passes of the complete runs."""
    rows_redone: int = 0
    """Rows in all commits less those that count."""
    rows_lost_about: int = 0
    """Of leases that ended before their commit, all that a driver's end has cut off included: the largest commit of the run for each."""
    groups_of_the_training: int = 0
    """Times that Ray Train has started its workers; one for each run, were there no deaths."""
    steps_redone_at_most: int = 0
    """Of the training: what a checkpoint interval holds, for each group but the last of a run."""
    longest_pause_s: float = 0.0
    """Without a new commit, checkpoint or finished stage."""
    hashes_equal: int = 0
    """Complete runs with the saliency, the plan, the masks and the rows of the undisturbed one."""
    undisturbed_s: float = 0.0
    """Mean of undisturbed runs on the same cluster."""
    overhead: float = 0.0
    """Mean of the disturbed runs over that."""

    deaths_by_stage: dict[str, int] = field(default_factory=dict)
    every_run: list[dict[str, Any]] = field(default_factory=list)

    @property
    def deaths(self) -> int:
        return self.workers_killed + self.nodes_killed + self.drivers_killed

    def table(self) -> str:
        figures = {name: value for name, value in asdict(self).items() if isinstance(value, int | float)}
        lines = [f"{name.replace('_', ' '):<40}{value:>9.6g}" for name, value in figures.items()]
        return "\n".join([*lines, f"deaths by stage: {self.deaths_by_stage}"])


# --- the saboteur -----------------------------------------------------------------------------------------------------


class Saboteur:
    """Kills, and has new nodes come. At least one node stays."""

    def __init__(self, nodes: Nodes, chance: random.Random, outcome: Outcome, every_s: float) -> None:
        self.nodes, self.random, self.outcome, self.every_s = nodes, chance, outcome, every_s
        self.alive: list[str] = []
        """Names of the worker nodes that are up."""
        self.coming: dict[str, Future[None]] = {}
        self.builder = ThreadPoolExecutor(1)  # nodes that start at the same time miss Ray's fixed start-up time
        self.deck: list[str] = []
        self.num_nodes = 0
        self.next = 0.0
        self.end = math.inf
        """From then on nobody is killed, so that the last run comes to its end."""

    def add_node(self, after_s: float = 0.0) -> None:
        name, due = f"n{self.num_nodes}", time.monotonic() + after_s
        self.num_nodes += 1

        def build() -> None:
            time.sleep(max(0.0, due - time.monotonic()))
            self.nodes.add(name)

        self.coming[name] = self.builder.submit(build)

    def welcome(self) -> None:
        """Nodes that have come up meanwhile; for one that could not, another is started."""
        for name in [name for name, node in self.coming.items() if node.done()]:
            if error := self.coming.pop(name).exception():
                say(f"node {name}: {str(error).splitlines()[0]}")
                self.nodes.kill(name)
                self.add_node()
            else:
                self.alive.append(name)

    def wait_for_nodes(self) -> None:
        deadline = time.monotonic() + STUCK_S
        while self.coming:
            assert time.monotonic() < deadline, f"{len(self.coming)} nodes do not start"
            self.welcome()
            time.sleep(LOOK_S)

    def rest(self, mean_s: float) -> None:
        self.next = time.monotonic() + self.random.expovariate(1 / mean_s)

    def act(self, run_dir: Path) -> str | None:
        """Kill somebody if it is time. Returns the kind."""
        self.welcome()
        if not self.next <= time.monotonic() < self.end:
            return None
        if not self.deck:
            self.deck = self.random.sample(DECK, len(DECK))
        kind = next((kind for kind in dict.fromkeys(self.deck) if getattr(self, f"kill_{kind}")(run_dir)), None)
        if kind is None:
            self.rest(AGAIN_S)
            return None
        self.deck.remove(kind)
        self.rest(self.every_s)
        return kind

    def kill_worker(self, run_dir: Path) -> bool:
        found = [pid for name in self.alive for line in WORKERS for pid in self.nodes.processes(name, line)]
        if not found or not kill(self.random.choice(found)):
            return False
        self.outcome.workers_killed += 1
        return True

    def kill_node(self, run_dir: Path) -> bool:
        if len(self.alive) < 2:
            return False
        name = self.random.choice(self.alive)
        self.alive.remove(name)
        self.nodes.kill(name)
        self.add_node(after_s=self.random.uniform(*NEW_NODE_S))
        self.outcome.nodes_killed += 1
        return True

    def kill_driver(self, run_dir: Path) -> bool:
        """And the shell that the job server has started it in."""
        if not any([kill(pid) for pid in self.nodes.processes("head", f"-m {JOB} --config {run_dir}/given.yaml")]):
            return False
        self.outcome.drivers_killed += 1
        return True

    def trainers(self) -> bool:
        """Is a group of Ray Train there?"""
        return any(self.nodes.processes(name, "ray::RayTrainWorker") for name in self.alive)

    def close(self) -> None:
        self.builder.shutdown(wait=True, cancel_futures=True)


def kill(pid: int) -> bool:
    """Whether the signal found it."""
    try:
        os.kill(pid, signal.SIGKILL)
        return True
    except ProcessLookupError:
        return False


# --- runs -------------------------------------------------------------------------------------------------------------


class Story:
    """One disturbed run, from its first submission to its end."""

    def __init__(self, saboteur: Saboteur, outcome: Outcome, rows: Path, run_dir: Path) -> None:
        self.saboteur, self.outcome, self.run_dir = saboteur, outcome, run_dir
        self.command = prepare(rows, run_dir)
        self.submissions = self.groups = self.deaths = self.lost_leases = 0
        self.seen, self.since = progress(run_dir), time.monotonic()
        self.training = False

    def play(self, undisturbed: Path) -> None:
        """Raises AssertionError if it ends otherwise than the undisturbed run."""
        started = time.monotonic()
        while not self.attempt():
            pass
        seconds = time.monotonic() - started
        require_equal(self.run_dir, undisturbed)
        total = self.outcome
        total.runs += 1
        total.hashes_equal += 1
        total.seconds += seconds
        total.rows_counted += sum(reading.rows for reading in passes(self.run_dir).values())
        total.rows_redone += rows_redone(self.run_dir)
        total.groups_of_the_training += self.groups
        total.rows_lost_about += self.lost_leases * largest_commit(self.run_dir)
        total.steps_redone_at_most += CHECKPOINT_EVERY_STEPS * max(0, self.groups - 1)
        about = {"seconds": seconds, "deaths": self.deaths, "submissions": self.submissions, "groups": self.groups}
        total.every_run.append(about)
        say(f"{self.run_dir.name} equals the undisturbed run: {about}")

    def attempt(self) -> bool:
        """One submission. Returns whether the run is complete."""
        nodes, driver_killed = self.saboteur.nodes, False
        name = f"{self.run_dir.name}-{self.submissions}"
        self.submissions += 1
        job = nodes.submit(name, self.command)
        try:
            while job.poll() is None:
                self.look()
                if kind := self.saboteur.act(self.run_dir):
                    driver_killed |= kind == "driver"
                    self.note(kind)
                time.sleep(LOOK_S)
        finally:
            job.kill()
            log = self.run_dir / "logs" / f"{name}.log"
            log.parent.mkdir(exist_ok=True)
            shutil.copy(nodes.log(name), log)
        told = log.read_text(errors="replace")
        lost = len(LOST.findall(told.partition(SAID_AGAIN)[0]))
        self.outcome.lost_leases += lost
        self.lost_leases += lost + NUM_WORKERS * driver_killed
        if job.returncode == 0:
            return True
        if driver_killed:
            self.outcome.submitted_again_after_a_killed_driver += 1
        elif gave_up := TOO_MANY.search(told):
            self.outcome.submitted_again_after_too_many_deaths += 1
            say(f"{name}: {gave_up[0]}")
        else:
            self.outcome.submitted_again_after_another_error += 1
            say(f"{name} ended with exit code {job.returncode}:\n{told[-3000:]}")
        return False

    def look(self) -> None:
        now, found = time.monotonic(), progress(self.run_dir)
        self.outcome.longest_pause_s = max(self.outcome.longest_pause_s, now - self.since)
        assert now - self.since < STUCK_S, f"nothing new for {STUCK_S:.0f} s: the run hangs, or gets nowhere"
        if found != self.seen:
            self.seen, self.since = found, now
        before, self.training = self.training, self.saboteur.trainers()
        self.groups += self.training and not before

    def note(self, kind: str) -> None:
        self.deaths += 1
        stage = next((name for name, state in stages(self.run_dir).items() if state == "running"), "between stages")
        by_stage = self.outcome.deaths_by_stage
        by_stage[stage] = by_stage.get(stage, 0) + 1
        say(f"{self.run_dir.name}: {kind} killed, {stage}, {self.seen}")


def run_undisturbed(nodes: Nodes, rows: Path, run_dir: Path) -> float:
    """Seconds of a run that nothing happens to."""
    started = time.monotonic()
    job = nodes.submit(run_dir.name, prepare(rows, run_dir))
    try:
        code = job.wait(timeout=1800)
    finally:
        job.kill()
    assert code == 0, nodes.log(run_dir.name).read_text()[-3000:]
    return time.monotonic() - started


def soak(directory: Path, minutes: float, seed: int, every_s: float = EVERY_S, num_undisturbed: int = 2) -> Outcome:
    """Runs until so many minutes have passed; the last one then goes on to its end undisturbed. What is left of a run that fails can be looked at."""
    rows, outcome = write_data(directory / "rows"), Outcome()
    with Nodes() as nodes:
        saboteur = Saboteur(nodes, random.Random(seed), outcome, every_s)
        try:
            for _ in range(NUM_NODES):
                saboteur.add_node()
            saboteur.wait_for_nodes()
            quiet = [directory / f"undisturbed-{i}" for i in range(num_undisturbed)]
            seconds = [run_undisturbed(nodes, rows, run_dir) for run_dir in quiet]
            outcome.undisturbed_s = statistics.mean(seconds)
            say(f"undisturbed: {', '.join(f'{one:.0f}' for one in seconds)} s")
            for run_dir in quiet[1:]:
                require_equal(run_dir, quiet[0])
            saboteur.end = time.monotonic() + 60 * minutes
            saboteur.rest(every_s)
            while time.monotonic() < saboteur.end:
                run_dir = directory / f"run-{outcome.runs}"
                try:
                    Story(saboteur, outcome, rows, run_dir).play(quiet[0])
                except BaseException as error:
                    error.add_note(f"in the run of {run_dir}, seed {seed}; its logs are there, too")
                    raise
                shutil.rmtree(run_dir)
        finally:
            saboteur.close()
    outcome.overhead = outcome.seconds / outcome.runs / outcome.undisturbed_s
    return outcome


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every-s", type=float, default=EVERY_S, help="mean of the waits between two deaths")
    parser.add_argument("--undisturbed", type=int, default=2, help="runs that nothing happens to, before the others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # no process of the cluster may stay
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        outcome = soak(directory, arguments.minutes, arguments.seed, arguments.every_s, arguments.undisturbed)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    shutil.rmtree(directory)
    print(outcome.table())
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(outcome), indent=1) + "\n")
    sys.exit(int(outcome.submitted_again_after_another_error > 0))


if __name__ == "__main__":
    main()
