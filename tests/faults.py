"""Real processes and real SIGKILLs, without Ray: the scoring pass and a saboteur.

One seed is one story. A driver runs the pass with one to four workers, all of them forked processes, over a ledger on disk. The saboteur
kills workers and drivers, stops workers until their units are given to others, tears commits, leaves temporary files about and
sends a second driver into the same directory. A worker whose driver is dead commits what it is at, and ends. A driver that is dead
is followed by another one, until the pass is complete: it has each row once, and the sha256 of an undisturbed pass in one process.

The seed fixes what happens and when; who wins a race is left to the machine. `python -m tests.faults --minutes 15` plays the
stories of rising seeds and ends with exit code 1 at the first that fails.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from pipeline.data.batches import Decoder
from pipeline.data.rows import open_source
from pipeline.data.units import Units
from pipeline.execution import coordinator
from pipeline.execution.coordinator import Done, Event, Joined, Lost, Tick
from pipeline.execution.drive import LocalPool, run_pass
from pipeline.execution.ledger import Ledger
from pipeline.execution.worker import Pass, UnitWorker
from pipeline.models.trace import propagate
from pipeline.saliency.exact import Grid, Magnitudes
from pipeline.saliency.statistics import GateStatistics
from tests.data.making import write_parquet
from tests.graphs import Residual

NUM_ROWS = 600
PASS_S = 0.8
"""What the pauses of an undisturbed pass add up to: time for the saboteur."""
SYNC_S = 0.004
"""What a file or a directory takes to reach the disk: time to die between a commit's bytes, its name and its message."""
RETRY_S = 0.02
"""The coordinator's first pause after a failure."""
LIMIT_S = 60.0
"""A story or a pass that takes longer hangs."""

# --- processes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A process by a descriptor that stays its own when its id is given to another, and is ready to read when it has ended."""

    pid: int
    fd: int

    @classmethod
    def of(cls, pid: int) -> Process:
        return cls(pid, os.pidfd_open(pid))

    @property
    def ended(self) -> bool:
        return bool(wait([self.fd], timeout=0))

    def send(self, number: signal.Signals) -> bool:
        """Whether the signal found it alive."""
        if self.ended:
            return False
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fd, number)
            return True
        return False

    def reap(self) -> int:
        """Wait for a child's end. Returns its exit code, minus the signal that killed it."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


def fork(function: Callable[..., None], *arguments: Any) -> Process:
    """Run a function in a child. It ends as if killed: nobody waits for its own children."""
    pid = os.fork()
    if pid:
        return Process.of(pid)
    try:
        function(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a child; its threads, and orphans of its own, are gone when it comes back."""
    here, there = Pipe(duplex=False)
    with here, there:
        child = fork(lambda: there.send(function(*arguments)))
        there.close()
        if not here.poll(LIMIT_S):
            child.send(signal.SIGKILL)
        with suppress(EOFError):
            result = here.recv()
        code = child.reap()
        reap_orphans()
    assert code == 0, f"{function.__name__}{arguments} ended with exit code {code} (-9: after {LIMIT_S:.0f} s)"
    return result


def adopt_orphans() -> None:
    """From now on orphans below this process become its children, not init's: they can be waited for."""
    set_child_subreaper = 36
    ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def reap_orphans() -> set[int]:
    """Wait for every child, adopted ones too. Returns their exit codes."""
    codes = set()
    with suppress(ChildProcessError):
        while True:
            codes.add(os.waitstatus_to_exitcode(os.wait()[1]))
    return codes


def send(connection: Connection, message: Any) -> None:
    """Pickled plainly: torch would move tensors through shared memory. A closed pipe shows where it is read."""
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.send_bytes(pickle.dumps(message))


def receive(connection: Connection) -> Any:
    """None when the other end is closed, or closes in the middle."""
    try:
        return pickle.loads(connection.recv_bytes())
    except (EOFError, OSError):
        return None


# --- the pool ---------------------------------------------------------------------------------------------------------


def serve(connection: Connection, foreign: list[Connection], tell: Callable[..., None], driver: int) -> None:
    """A worker's life: a UnitWorker that does what comes through the pipe, until the pipe closes."""
    for other in foreign:  # an end held here would keep a sibling from noticing that the driver is gone
        other.close()
    tell("worker", os.getpid(), driver)
    worker = UnitWorker(torch.device("cpu"), threads=1)
    while request := receive(connection):
        method, argument = request
        result = getattr(worker, method)(*argument)
        send(connection, (method, len(result.bad_rows) if method == "work" else result))


class ProcessPool:
    """Workers as forked processes, each at its own pipe.

    Args:
        num_workers: how many to begin with.
        tell: is told ("worker", pid, driver's pid) by each worker, and ("again", pid) when units of that worker's lease are
            given to another one.
        order: unit u of a lease stands for unit order[u].
    """

    def __init__(
        self, num_workers: int, tell: Callable[..., None] = lambda *message: None, order: list[int] | None = None
    ) -> None:
        self.num_workers = num_workers
        self._tell = tell
        self._order = order
        self._workers: dict[str, tuple[Process, Connection]] = {}
        self._leases: dict[str, tuple[int, set[int]]] = {}
        self._early: list[tuple[str, str, Any]] = []
        self._num_spawned = 0
        self._work: Pass | None = None
        self._grid: Grid | None = None

    def start(self, work: Pass) -> None:
        self._work = work
        for _ in range(self.num_workers):
            self.spawn()

    def spawn(self) -> None:
        ours, theirs = Pipe()
        foreign = [ours, *(connection for _, connection in self._workers.values())]
        process = fork(serve, theirs, foreign, self._tell, os.getpid())
        theirs.close()
        self._num_spawned += 1
        name = f"w{self._num_spawned}"
        self._workers[name] = (process, ours)
        self._ask(name, "load", self._work)
        if self._grid is not None:
            self._ask(name, "fix_grid", self._grid)

    def pilot(self) -> tuple[Magnitudes, str]:
        """From the first worker; when it dies, from the next."""
        asked, found = "", None
        while found is None:
            if asked not in self._workers:
                asked = next(iter(self._workers))
                self._ask(asked, "pilot")
            for worker, method, result in self._hear(timeout_s=1.0):
                if method == "pilot":
                    found = result
                elif method == "died":  # replaced here: the coordinator does not know it yet
                    self._early = [early for early in self._early if early[0] != worker]
                    self.spawn()
                else:
                    self._early.append((worker, method, result))
        return found

    def fix_grid(self, grid: Grid) -> None:
        self._grid = grid
        for name in self._workers:
            self._ask(name, "fix_grid", grid)

    def assign(self, worker: str, lease: int, units: tuple[int, ...]) -> None:
        for other, (_, theirs) in self._leases.items():
            if theirs & {*units}:
                self._tell("again", self._workers[other][0].pid)
        self._leases[worker] = lease, {*units}
        self._ask(worker, "work", tuple(self._order[unit] for unit in units) if self._order else units)

    def events(self, timeout_s: float) -> list[Event]:
        heard, self._early = self._early, []
        heard = heard or self._hear(min(timeout_s, 0.05))
        now = time.monotonic()
        events: list[Event] = []
        for worker, method, result in heard:
            lease, _ = self._leases.pop(worker, (0, ())) if method in ("work", "died") else (0, ())
            if method == "load":
                events.append(Joined(worker, now))
            elif method == "work":
                events.append(Done(worker, lease, now, bad_rows=result))
            elif method == "died":
                events.append(Lost(worker, f"exit code {result}", now))
        return events or [Tick(now)]

    def finish(self) -> None:
        """Whoever is still at work finds its pipe closed when it has committed."""
        for process, connection in self._workers.values():
            connection.close()
            os.close(process.fd)
        self._workers.clear()
        self._leases.clear()

    def _ask(self, worker: str, method: str, *argument: Any) -> None:
        send(self._workers[worker][1], (method, argument))

    def _hear(self, timeout_s: float) -> list[tuple[str, str, Any]]:
        """(worker, method, result) of each answer, and (worker, "died", exit code) of each death, later than its answers."""
        wait([end for process, connection in self._workers.values() for end in (process.fd, connection)], timeout_s)
        heard: list[tuple[str, str, Any]] = []
        for worker, (process, connection) in list(self._workers.items()):
            dead = process.ended
            answers = []
            while connection.poll() and (answer := receive(connection)):
                answers.append((worker, *answer))
            heard += answers
            if dead and not answers:
                del self._workers[worker]
                connection.close()
                code = process.reap()
                assert code == -signal.SIGKILL, f"worker {worker} failed with exit code {code}; see its traceback"
                heard.append((worker, "died", code))
        return heard


# --- the pass ---------------------------------------------------------------------------------------------------------


def write_rows(path: Path) -> Path:
    """PNG of noise over a colour that tells the class."""
    noise = np.random.default_rng(0)
    images = []
    for i in range(NUM_ROWS):
        buffer = io.BytesIO()
        Image.fromarray((noise.random((8, 8, 3)) * 120 + 30 * (i % 5)).astype(np.uint8)).save(buffer, format="PNG")
        images.append(buffer.getvalue())
    return write_parquet(path, images, [i % 5 for i in range(NUM_ROWS)], rows_per_group=100)


class Slow(GateStatistics):
    """Statistics that take their time: a signal finds their worker at work."""

    pause_s = 0.0

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
        time.sleep(self.pause_s)
        return super().__call__(images_NCHW, labels_N)


@dataclass(frozen=True)
class Scene:
    """What decides the bits of a pass."""

    rows: Path
    weights: bool
    """Statistics of the weights, or of the channels alone."""
    rows_per_unit: int = 20
    micro_batch: int = 10

    def work(self, directory: Path, pauses_s: float = 0.0) -> Pass:
        """`pauses_s`: what the pauses before all micro-batches add up to."""
        torch.manual_seed(0)
        model = Residual().eval()
        task = Slow(model, propagate(model, torch.zeros(1, 3, 4, 4)), weights=self.weights)
        source = open_source(str(self.rows))
        units = Units(source.row_groups, self.rows_per_unit)
        task.pause_s = pauses_s / sum(-(-unit.num_rows // self.micro_batch) for unit in units)
        return Pass(
            task=task,
            source=source,
            units=units,
            decoder=Decoder(size=4, crop_pct=1.0),
            ledger=Ledger(str(directory), len(units), "the fingerprint of this pass"),
            grid=None,
            micro_batch=self.micro_batch,
            num_classes=5,
            on_bad_row="stop",
        )


@dataclass(frozen=True)
class Answer:
    """What is told of a complete pass."""

    sha256: str
    rows: int
    commits: int


def run_alone(scene: Scene, directory: Path) -> Answer:
    """The pass in one process."""
    result = run_pass(scene.work(directory), LocalPool())
    return Answer(result.sha256, result.rows, result.commits)


def run_shuffled(scene: Scene, directory: Path, num_workers: int, seed: int) -> Answer:
    """The pass with its units in a random order."""
    work = scene.work(directory)
    order = random.Random(seed).sample(range(len(work.units)), len(work.units))
    result = run_pass(work, ProcessPool(num_workers, order=order), commit_interval_s=0.02)
    return Answer(result.sha256, result.rows, result.commits)


@cache
def undisturbed(scene: Scene) -> Answer:
    with tempfile.TemporaryDirectory() as directory:
        return call(run_alone, scene, Path(directory))


def drive(scene: Scene, directory: Path, num_workers: int, commit_interval_s: float, tell: Callable[..., None]) -> None:
    """A driver's life. The pauses are the longer the more workers share them."""
    os.setpgid(0, 0)
    work = scene.work(directory, pauses_s=PASS_S * num_workers)
    sync = os.fsync

    def slow_sync(descriptor: int) -> None:
        time.sleep(SYNC_S)
        sync(descriptor)

    with patch.object(coordinator, "FIRST_PAUSE_S", RETRY_S), patch.object(os, "fsync", slow_sync):
        pool = ProcessPool(num_workers, tell)
        result = run_pass(work, pool, commit_interval_s=commit_interval_s, max_failures=1000)
    tell("answer", Answer(result.sha256, result.rows, result.commits))


# --- the story --------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What happened in some stories."""

    stories: int = 0
    worker_kills: int = 0
    driver_kills: int = 0
    stops: int = 0
    stopped_past_the_lease: int = 0
    """Workers that went on when their units had been given to another."""
    torn_commits: int = 0
    temporary_files: int = 0
    second_drivers: int = 0
    doubled_commits_left_out: int = 0
    rows_redone: int = 0
    """Rows committed in total minus rows of the pass."""
    hashes_equal: int = 0
    """Complete passes, those read again included, with the sha256 and the rows of the undisturbed one."""
    seconds: float = 0.0

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def table(self) -> str:
        return "\n".join(f"{name.replace('_', ' '):<26}{value:>9.6g}" for name, value in asdict(self).items())


class Story:
    """One pass over `scene`, with its ledger in `directory`, and everything that is done to it."""

    def __init__(self, scene: Scene, expected: Answer, directory: Path, chance: random.Random) -> None:
        self.scene = scene
        self.expected = expected
        self.directory = directory
        self.random = chance
        self.outcome = Outcome(stories=1)
        self.deadline = time.monotonic() + LIMIT_S
        self.roll, self._roll_call = Pipe(duplex=False)
        self.drivers: dict[int, Process] = {}
        """Those that run, by pid."""
        self.groups: list[int] = []
        """Of all drivers ever, with their workers."""
        self.workers: dict[int, Process] = {}
        self.driver_of: dict[int, int] = {}
        self.stopped: dict[int, float] = {}
        """When a stopped worker shall go on."""
        self.overdue: set[int] = set()
        self.torn: dict[str, int] = {}
        """Rows that a commit had, by its name."""
        faults = [self.kill_worker] * 5 + [self.kill_driver] * self.random.choice([1, 2])
        faults += [self.stop_worker, self.tear_commit, self.leave_temporary_file]
        faults += [self.start_second_driver] * self.random.choice([0, 1])
        self.random.shuffle(faults)
        self.faults = [*faults, self.stop_worker]
        """Nothing comes after the last one that keeps its lease from running out."""

    def play(self) -> Outcome:
        try:
            self.start_driver()
            while self.drivers or not self.outcome.hashes_equal:
                if not self.drivers:
                    self.start_driver()
                self.rest()
                done = next((fault for fault in self.faults if fault()), None)  # the first that is possible now
                if done:
                    self.faults.remove(done)
            self.farewell()
        finally:
            self.kill_all()
        self.count()
        return self.outcome

    # --- people ---

    def tell(self, *message: Any) -> None:
        self._roll_call.send(message)

    def start_driver(self) -> None:
        num_workers, interval = self.random.randint(1, 4), self.random.choice([0.02, 0.1, 0.3])
        driver = fork(drive, self.scene, self.directory, num_workers, interval, self.tell)
        self.drivers[driver.pid] = driver
        self.groups.append(driver.pid)

    @property
    def commits(self) -> list[Path]:
        return sorted(self.directory.glob("commit-*"))

    def rest(self) -> None:
        """Between two faults: a moment, and then until some commits more are there, so that the faults are spread over the pass."""
        enough = len(self.commits) + self.random.randint(0, 3)
        self.listen(self.random.uniform(0.02, 0.15))
        patience = time.monotonic() + 0.5
        while self.drivers and len(self.commits) < enough and time.monotonic() < patience:
            self.listen(0.01)

    def listen(self, seconds: float) -> None:
        """Let time pass: hear who is there, see who has ended, let stopped workers go on when it is time."""
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            assert now < self.deadline, f"the pass is not complete after {LIMIT_S:.0f} s: drivers {[*self.drivers]}"
            wait([self.roll, *(driver.fd for driver in self.drivers.values())], min(end - now, 0.01))
            while self.roll.poll():
                self.hear(self.roll.recv())
            for driver in list(self.drivers.values()):
                if driver.ended:
                    self.bury(driver)
            for pid in [pid for pid, until in self.stopped.items() if until < now]:
                del self.stopped[pid]
                self.workers[pid].send(signal.SIGCONT)

    def hear(self, message: tuple[Any, ...]) -> None:
        match message:
            case ("worker", pid, driver):
                with suppress(ProcessLookupError):
                    self.workers[pid], self.driver_of[pid] = Process.of(pid), driver
            case ("again", pid) if pid in self.stopped:
                self.overdue.add(pid)
                self.stopped[pid] = time.monotonic() + self.random.uniform(0, 0.2)
            case ("answer", answer):
                self.require_equal(answer)

    def require_equal(self, answer: Answer) -> None:
        expected = self.expected
        assert (answer.sha256, answer.rows) == (expected.sha256, expected.rows), f"{answer}, undisturbed {expected}"
        self.outcome.hashes_equal += 1

    def bury(self, driver: Process) -> None:
        del self.drivers[driver.pid]
        code = driver.reap()
        while self.roll.poll():  # its last words
            self.hear(self.roll.recv())
        assert code in (0, -signal.SIGKILL), f"a driver ended with exit code {code}; its traceback is on stderr"
        self.outcome.driver_kills += code == -signal.SIGKILL
        for pid in self.stopped:
            if self.driver_of[pid] == driver.pid:
                self.stopped[pid] = time.monotonic() + self.random.uniform(0.05, 0.4)

    def at_work(self, driver: int) -> list[Process]:
        """Workers of a driver that nothing has been done to."""
        team = [self.workers[pid] for pid, own in self.driver_of.items() if own == driver and pid not in self.stopped]
        return [worker for worker in team if not worker.ended]

    # --- faults: each returns whether it was possible ---

    def kill_worker(self) -> bool:
        workers = [(worker, driver) for driver in self.drivers.values() for worker in self.at_work(driver.pid)]
        if not workers:
            return False
        worker, driver = self.random.choice(workers)
        hit = worker.send(signal.SIGKILL) and not driver.ended  # after the end of the pass it would not matter
        self.outcome.worker_kills += hit
        return hit

    def kill_driver(self) -> bool:
        """Or, in half of all cases, kill it after one of its workers was stopped, which thus commits late."""
        if not self.drivers:
            return False
        driver = self.random.choice(list(self.drivers.values()))
        workers = self.at_work(driver.pid)
        if workers and self.random.random() < 0.5:
            self.stop(self.random.choice(workers))
        return driver.send(signal.SIGKILL)

    def stop_worker(self) -> bool:
        """One that has a colleague: somebody must take over its units."""
        team = next((team for team in map(self.at_work, self.drivers) if len(team) > 1), None)
        return team is not None and self.stop(self.random.choice(team))

    def stop(self, worker: Process) -> bool:
        if not worker.send(signal.SIGSTOP):
            return False
        self.stopped[worker.pid] = time.monotonic() + 4.0
        self.outcome.stops += 1
        return True

    def tear_commit(self) -> bool:
        """Its second half did not reach the disk: the file ends there, or goes on with zeros."""
        whole = [path for path in self.commits if path.name not in self.torn]
        if not whole:
            return False
        path = self.random.choice(whole)
        self.torn[path.name] = rows_of(path)
        size = path.stat().st_size
        os.truncate(path, size // 2)
        if self.random.random() < 0.5:
            os.truncate(path, size)
        self.outcome.torn_commits += 1
        return True

    def leave_temporary_file(self) -> bool:
        if not self.commits:
            return False
        path = self.random.choice(self.commits)
        half = path.read_bytes()[: path.stat().st_size // 2]
        path.with_name(f".{path.name}.tmp-{self.random.getrandbits(32):08x}").write_bytes(half)
        self.outcome.temporary_files += 1
        return True

    def start_second_driver(self) -> bool:
        """Two of them do the same units in the same directory, and do not know of each other."""
        if not self.drivers:
            return False
        self.start_driver()
        self.outcome.second_drivers += 1
        return True

    # --- the end ---

    def farewell(self) -> None:
        """Workers without a driver end by themselves. The roll ends when the last of them is gone."""
        for pid in self.stopped:
            self.workers[pid].send(signal.SIGCONT)
        self._roll_call.close()
        with suppress(EOFError):
            while self.roll.poll(10.0):
                self.hear(self.roll.recv())
            raise AssertionError("workers go on without a driver")
        codes = reap_orphans()
        assert codes <= {0, -signal.SIGKILL}, f"orphans ended with exit codes {codes}; their traceback is on stderr"

    def kill_all(self) -> None:
        for driver in self.drivers.values():
            driver.send(signal.SIGKILL)
        for group in self.groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        reap_orphans()
        for process in [*self.drivers.values(), *self.workers.values()]:
            os.close(process.fd)
        self.roll.close()
        self._roll_call.close()

    def count(self) -> None:
        """Read the ledger again, after the last late commit: it still adds up to the same."""
        answer = call(run_alone, self.scene, self.directory)
        self.require_equal(answer)
        self.outcome.stopped_past_the_lease = len(self.overdue)
        self.outcome.doubled_commits_left_out = len(self.commits) - len(self.torn) - answer.commits
        rows = sum(self.torn[path.name] if path.name in self.torn else rows_of(path) for path in self.commits)
        self.outcome.rows_redone = rows - answer.rows


def rows_of(commit: Path) -> int:
    with safe_open(commit, "pt") as file:
        return int(file.metadata()["rows"])


def story(seed: int, directory: Path) -> Outcome:
    """Play the story of this seed. Odd ones have the statistics of the weights, too. What is left of one that fails can be looked at."""
    started = time.monotonic()
    rows = directory / "rows.parquet"
    if not rows.exists():
        write_rows(rows)
    chance = random.Random(seed)
    scene = Scene(rows, bool(seed % 2), rows_per_unit=chance.choice([12, 15, 20]), micro_batch=chance.choice([6, 12]))
    ledger = directory / f"story-{seed}"
    try:
        outcome = Story(scene, undisturbed(scene), ledger, chance).play()
    except BaseException as error:
        error.add_note(f"in the story of seed {seed}, {scene}; its ledger: {ledger}")
        raise
    shutil.rmtree(ledger)
    outcome.seconds = time.monotonic() - started
    return outcome


def prepare() -> None:
    """Before the first fork: a process of one thread that adopts the orphans of the drivers."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    adopt_orphans()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--first", type=int, default=0, help="seed of the first story")
    parser.add_argument("--json", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    prepare()
    end = time.monotonic() + 60 * arguments.minutes
    total, seed = Outcome(), arguments.first
    directory = Path(tempfile.mkdtemp(prefix="faults-"))
    while time.monotonic() < end:
        try:
            total += story(seed, directory)
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        seed += 1
    shutil.rmtree(directory)
    print(total.table())
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(total), indent=1) + "\n")


if __name__ == "__main__":
    main()
