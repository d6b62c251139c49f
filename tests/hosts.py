"""Network namespaces in place of hosts: each node has an address, a name and a cable of its own, and can be cut off from the others.

One namespace is the switch, a bridge; one more for each host hangs on it. The client stays outside, with a cable to the switch. Hosts
share the file system, which is the storage that every node of a cluster must see. A cable is pulled at the switch, so that a host that
is cut off goes on working and hears nothing: no connection is reset.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import shutil
import subprocess
from pathlib import Path

from tests.nodes import Nodes

CLIENT = "client"
HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
}
"""A node that says nothing is dead after 15 s; by Ray's own values it is after 62 s."""


class NoHosts(RuntimeError):
    """There can be no hosts on this machine."""


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


class Hosts(Nodes):
    """Nodes on hosts of their own. Raises NoHosts where there can be none."""

    def __init__(self) -> None:
        if os.geteuid():
            raise NoHosts("only root makes network namespaces")
        if not shutil.which("ip") or not shutil.which("unshare"):
            raise NoHosts("ip (of iproute2) or unshare (of util-linux) is not installed")
        super().__init__()
        self.subnet = _free_subnet()
        self._numbers = {CLIENT: 1}
        self._opened: list[str] = []

    def address(self, name: str) -> str:
        return str(self.subnet[self._number(name)])

    def environment(self, node: str = CLIENT) -> dict[str, str]:
        return {**super().environment(node), **HEALTH}

    def __enter__(self) -> Hosts:
        try:
            try:
                self._open(self._switch)
                ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
                ip("-n", self._switch, "link", "set", "bridge", "up")
                self._plug_in(CLIENT)
            except RuntimeError as error:
                raise NoHosts(f"this machine makes no networks: {error}") from error
        except BaseException:
            self.__exit__()
            raise
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            super().__exit__(*error)
        finally:
            for namespace in self._opened:  # with a namespace go its ends of cables, and with one end the other
                subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, timeout=30, check=False)
                shutil.rmtree(_files(namespace), ignore_errors=True)

    def cut(self, name: str) -> None:
        """Pull the cable of a host; `mend` puts it back."""
        ip("-n", self._switch, "link", "set", self._cable(name), "down")

    def mend(self, name: str) -> None:
        ip("-n", self._switch, "link", "set", self._cable(name), "up")

    def _inside(self, name: str) -> list[str]:
        namespace = f"{self._switch}-{name}"
        if namespace not in self._opened:
            # `ip netns exec` puts this file in the place of /etc/hosts.
            _files(namespace).mkdir(parents=True)
            (_files(namespace) / "hosts").write_text(f"127.0.0.1 localhost\n{self.address(name)} {name}\n")
            self._open(namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
            self._plug_in(name, namespace)
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name]
        return ["ip", "netns", "exec", namespace, *named]

    def _open(self, namespace: str) -> None:
        ip("netns", "add", namespace)
        self._opened.append(namespace)

    def _plug_in(self, name: str, namespace: str | None = None) -> None:
        """A cable from the switch to a host; without a namespace, to where we are."""
        cable, there = self._cable(name), ["-n", namespace] if namespace else []
        outside = ["netns", namespace] if namespace else ["netns", str(os.getpid())]
        ip("-n", self._switch, "link", "add", cable, "type", "veth", "peer", "name", f"{cable}h", *outside)
        ip("-n", self._switch, "link", "set", cable, "master", "bridge", "up")
        ip(*there, "address", "add", f"{self.address(name)}/{self.subnet.prefixlen}", "dev", f"{cable}h")
        ip(*there, "link", "set", f"{cable}h", "up")

    @property
    def _switch(self) -> str:
        return f"hosts-{self.mark}"

    def _cable(self, name: str) -> str:
        return f"h{self.mark}-{self._number(name)}"  # at most 15 letters

    def _number(self, name: str) -> int:
        return self._numbers.setdefault(name, len(self._numbers) + 1)


def _files(namespace: str) -> Path:
    return Path("/etc/netns") / namespace


def _free_subnet() -> ipaddress.IPv4Network:
    """One that this machine has no way to yet."""
    routes = [route["dst"] for route in json.loads(ip("-4", "-j", "route", "show", "table", "all"))]
    known = [ipaddress.IPv4Network(route, strict=False) for route in routes if route != "default"]
    while True:
        found = ipaddress.IPv4Network(f"10.{secrets.randbelow(256)}.{secrets.randbelow(256)}.0/24")
        if not any(found.overlaps(one) for one in known):
            return found
