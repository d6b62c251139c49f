"""A Ray cluster of several nodes on this machine, each with processes of its own that can be killed like a machine.

Ports, token and directory are its own, so that it does not meet another Ray on the machine; every process carries a mark in its
environment, by which all of a node's are found, whoever their parents are.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.execution.machine import free_port

ROOT = Path(__file__).parents[1]
RAY = [str(Path(sys.executable).parent / "ray")]
MARK = "PRUNING_TEST_NODE"


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 600, every_s: float = 0.05) -> float:
    """Seconds until it holds."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout_s:
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(every_s)
    return time.monotonic() - started


class Nodes:
    """A head that takes no work, and workers that come and go. Used as a context: whatever happens inside, no process is left."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))  # paths of sockets must be short
        self.mark = secrets.token_hex(4)
        (self.directory / "token").write_text(secrets.token_hex(32))
        self.gcs, self.dashboard = free_port(), free_port()
        self._started: list[subprocess.Popen[bytes]] = []

    @property
    def url(self) -> str:
        return f"http://{self.address('head')}:{self.dashboard}"

    def address(self, name: str) -> str:
        """Of a node; the same for all, since they are one machine."""
        return "127.0.0.1"

    def environment(self, node: str = "client") -> dict[str, str]:
        """Of the processes of a node, and of those that talk to the cluster."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {
            **kept,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.directory / "token"),
            "RAY_DEDUP_LOGS": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": f"{self.address('head')}:{self.gcs}",
            "RAY_API_SERVER_ADDRESS": self.url,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            MARK: f"{self.mark}-{node}",
        }

    def __enter__(self) -> Nodes:
        try:
            options = {
                "port": self.gcs,
                "dashboard-host": self.address("head"),
                "dashboard-port": self.dashboard,
                "ray-client-server-port": free_port(),
            }
            self._start("head", ["--head", "--num-cpus=0", *(f"--{name}={value}" for name, value in options.items())])
            wait_for(self._answers, "the head's dashboard")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.kill("")
        for node in self._started:
            node.wait()
        wait_for(self._removed, f"removal of {self.directory}", timeout_s=60)

    def add(self, name: str, num_cpus: int = 1) -> None:
        """A node that joins; it is there when this returns. A name is used again only when nothing of its node is left."""
        for attempt in range(3):  # on a busy machine a node may miss Ray's fixed start-up time
            if attempt:
                self.kill(name)
            node = self._start(name, [f"--address={self.address('head')}:{self.gcs}", f"--num-cpus={num_cpus}"])
            wait_for(lambda node=node: node.poll() is not None or self._runs(name), f"node {name}")
            if self._runs(name):
                return
        raise RuntimeError(f"node {name} does not start: {(self.directory / f'{name}.out').read_text()[-2000:]}")

    def kill(self, name: str) -> None:
        """SIGKILL to every process of a node, as when a machine is switched off; "" is all of them."""
        while found := self.processes(name):
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)

    def processes(self, name: str, command: str = "") -> list[int]:
        """Ids of a node's processes whose command line has `command` in it."""
        mark = f"{MARK}={self.mark}-{name}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and any(
                    one == mark or (not name and one.startswith(mark))
                    for one in (entry / "environ").read_bytes().split(b"\0")
                ):
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    zombie = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                    found += [int(entry.name)] if command in line and not zombie else []
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return [pid for pid in found if pid != os.getpid()]

    def ray(self, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """The command line of Ray, as a user of this cluster."""
        return subprocess.run(
            [*RAY, *arguments],
            env=self.environment(),
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
        )

    def submit(self, name: str, command: list[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """`ray job submit` of this repository's code; it shows the job's log, which is in `log(name)`, until the job ends."""
        options = ["--submission-id", name, "--working-dir", "."]
        with self.log(name).open("wb") as log:
            return subprocess.Popen(
                [*RAY, "job", "submit", *options, "--", *command],
                env={**self.environment(), **(env or {})},
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def _removed(self) -> bool:
        self.kill("")  # what was just being started had no mark yet
        shutil.rmtree(self.directory, ignore_errors=True)
        return not self.directory.exists()

    def _inside(self, name: str) -> list[str]:
        """What a command of a node begins with to run there."""
        return []

    def _runs(self, name: str) -> bool:
        return "Ray runtime started" in (self.directory / f"{name}.out").read_text()

    def _start(self, name: str, options: list[str]) -> subprocess.Popen[bytes]:
        every = [
            f"--node-ip-address={self.address(name)}",
            f"--dashboard-agent-listen-port={free_port()}",
            f"--temp-dir={self.directory / name}",  # a node that joins unpacks the job's code over that of others in the same place
            "--object-store-memory=100000000",
            "--block",
        ]
        with (self.directory / f"{name}.out").open("wb") as out:
            node = subprocess.Popen(
                [*self._inside(name), *RAY, "start", *options, *every],
                env=self.environment(name),
                cwd=self.directory,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(node)
        return node

    def _answers(self) -> bool:
        try:
            with socket.create_connection((self.address("head"), self.dashboard), timeout=1):
                return True
        except OSError:
            return False
