"""Before the first stage: can every node do what the stages will ask of it? What would end a run after hours ends it now.

A file is not shared because its path exists everywhere, so driver and nodes exchange tokens through the run directory. Nodes that
come later are not asked; the ledger looks at the directory, and at the device, before their first lease.
"""

from __future__ import annotations

import platform
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import NodeDiedError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import artifacts
from pipeline.data.folder import FolderSource
from pipeline.data.parquet import ParquetSource
from pipeline.data.places import Files
from pipeline.data.rows import Source
from pipeline.execution.pool import nodes_for_workers

TIMEOUT_S = 180.0
"""A cold node imports torch for a while; a mount that hangs never answers."""

WAYS_OUT = {
    "code": "Give all nodes one image (deploy/Dockerfile), or submit the job with --working-dir, which sends the code along",
    "versions": "Give all nodes one image (deploy/Dockerfile): other versions round differently",
    "run": "Choose a --run-dir on storage that all nodes share: s3://, gs://, or a file system mounted everywhere for reading and writing",
    "data": "Put the data on storage that all nodes share, or at the same path on every node, as the same files",
    "silent": "Look at its mounts: one that hangs blocks every reader. Or take the node out of the cluster",
}
"""What to do, by what is wrong."""

Fault = tuple[str, str]
"""Key of WAYS_OUT, and what is wrong."""


class UnfitNodes(ValueError):
    """Nodes that cannot take part in this run."""


def probe_nodes(directory: str, sources: Sequence[Source], *, device: str, threads: int) -> int:
    """Have every node that can hold a worker look at the run directory, the data and its versions.

    The driver's own node sees what the driver sees, and is not asked: on one machine this costs nothing.

    Args:
        directory: of the run; the driver writes a token there, and each node an answer. Both are removed.
        sources: the first and the last file of each is opened.
        device, threads: what one worker takes.

    Returns:
        How many nodes have answered.

    Raises:
        UnfitNodes: one error for all of them, with node, path and the way out.
    """
    here = _own_node()
    able = nodes_for_workers(device, threads)
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["NodeID"] in able and node["NodeID"] != here}
    if not nodes:
        return 0
    token = secrets.token_hex(8)
    question = artifacts.join(directory, f"probe-{token}")
    answers = {node: artifacts.join(directory, f"probe-{token}-{node[:16]}") for node in nodes}
    artifacts.write_bytes(question, token.encode())
    try:
        faults = _ask(nodes, question, token, answers, _ends(sources))
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        # A node that went while it was asked takes no part, and is no fault.
        faults = {node: found for node, found in faults.items() if node in alive}
    finally:
        for path in (question, *answers.values()):
            artifacts.remove(path) if artifacts.exists(path) else None
    if any(faults.values()):
        raise UnfitNodes(_message(nodes, faults))
    return len(faults)


def _own_node() -> str:
    return ray.get_runtime_context().get_node_id()


def _ends(sources: Sequence[Source]) -> list[tuple[str, str, int]]:
    """Root, name and size of the first and the last file of each source."""
    every: list[Files] = [source.files for source in sources if isinstance(source, ParquetSource | FolderSource)]
    ends = [(files.root, files.names[i], files.sizes[i]) for files in every for i in (0, len(files.names) - 1)]
    return list(dict.fromkeys(ends))


def _ask(
    nodes: dict[str, Any], question: str, token: str, answers: dict[str, str], files: list[tuple[str, str, int]]
) -> dict[str, list[Fault]]:
    """Faults of each node; of a fit one none."""
    versions = {"python": _release(platform.python_version(), 2), "torch": _release(torch.__version__, 3)}
    # It waits for no CPU: another job on the cluster is no reason to wait.
    task = ray.remote(num_cpus=0, max_retries=0)(_look())
    pending = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            question, token, answers[node], files, versions
        ): node
        for node in nodes
    }
    ready, late = ray.wait(list(pending), num_returns=len(pending), timeout=TIMEOUT_S)
    faults: dict[str, list[Fault]] = {}
    for reference in ready:
        node = pending[reference]
        try:
            faults[node] = ray.get(reference)
        except NodeDiedError:  # the list of nodes may not say so yet
            continue
        except RayError as error:
            faults[node] = [("code", f"a task fails there: {str(error).strip().splitlines()[-1]}")]
            continue
        if not faults[node] and not artifacts.exists(answers[node]):
            faults[node] = [("run", f"what it writes to {answers[node]} does not arrive here")]
    for reference in late:
        ray.cancel(reference, force=True)
        faults[pending[reference]] = [("silent", f"no answer within {TIMEOUT_S:.0f} s")]
    return faults


def _look() -> Callable[..., list[Fault]]:
    """What a node does. A function inside a function travels by value: it also runs where the package is missing."""

    def look(
        question: str, token: str, answer: str, files: list[tuple[str, str, int]], versions: dict[str, str]
    ) -> list[tuple[str, str]]:
        import platform

        try:
            import torch

            from pipeline import artifacts
            from pipeline.execution import worker  # noqa: F401  all that a worker needs
        except Exception as error:
            return [("code", f"the project cannot be imported: {type(error).__name__}: {error}")]
        faults = []
        own = {"python": platform.python_version(), "torch": torch.__version__.partition("+")[0]}
        for name, version in versions.items():
            if own[name].split(".")[: len(version.split("."))] != version.split("."):
                faults.append(("versions", f"{name} {own[name]} there, {version} here"))
        try:
            if artifacts.read_bytes(question).decode() != token:
                faults.append(("run", f"{question} has another content there"))
            else:
                artifacts.write_bytes(answer, token.encode())
        except Exception as error:  # of our own storage, and names the path
            faults.append(("run", getattr(error, "strerror", None) or str(error)))
        for root, name, size in files:
            place = artifacts.shown(f"{root.partition('?')[0].rstrip('/')}/{name}")
            try:
                with (
                    artifacts.storage(root) as (filesystem, inner),
                    filesystem.open_input_file(f"{inner.rstrip('/')}/{name}") as file,
                ):
                    found = file.size()
                if found != size:
                    faults.append(("data", f"{place} has {found} bytes there, {size} here"))
            except Exception as error:
                faults.append(("data", f"{place} cannot be opened: {getattr(error, 'strerror', None) or error}"))
        return faults

    return look


def _release(version: str, parts: int) -> str:
    """2.14.1+cu130 -> 2.14.1: a head without a GPU may have the build without CUDA."""
    return ".".join(version.partition("+")[0].split(".")[:parts])


def _message(nodes: dict[str, Any], faults: dict[str, list[Fault]]) -> str:
    """Equal faults are told once."""
    by_fault: dict[Fault, list[str]] = {}
    for node, found in sorted(faults.items()):
        for fault in found:
            by_fault.setdefault(fault, []).append(f"{nodes[node]['NodeManagerHostname']} ({node[:8]})")
    unfit = sum(bool(found) for found in faults.values())
    lines = [f"{unfit} of {len(faults)} nodes cannot take part in this run."]
    for (kind, what), names in by_fault.items():
        others = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"  {', '.join(names[:3])}{others}: {what}. {WAYS_OUT[kind]}.")
    return "\n".join(lines)
