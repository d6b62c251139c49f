"""Checkpoints of a training run: `step-00000123.pt`, whole or not there, plain values only, refused when foreign.

One file holds everything that the next step depends on, so that a resumed run equals the undisturbed one. Two are
kept: should the newest be damaged, the one before it is used. Damage is found by the CRC-32 that torch writes with
each tensor.
"""

from __future__ import annotations

import io
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from pipeline import artifacts
from pipeline.artifacts import StaleArtifact

logger = logging.getLogger(__name__)

NAME = re.compile(r"step-(\d{8})\.pt")
NUM_KEPT = 2


class DamagedCheckpoint(ValueError):
    """The bytes are not those that were written."""


def path_of(directory: str, step: int) -> str:
    return artifacts.join(directory, f"step-{step:08d}.pt")


def steps_in(directory: str) -> list[int]:
    """Steps with a checkpoint, newest first."""
    return sorted((int(m[1]) for m in map(NAME.fullmatch, artifacts.list_dir(directory)) if m), reverse=True)


def save(directory: str, state: Mapping[str, Any]) -> str:
    """Write `state` (with "step" and "identity") atomically, then remove all but the newest two. Returns the path.

    Files of later steps are removed, too: had they been readable, this run would have started from them.
    """
    step = int(state["step"])
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    path = path_of(directory, step)
    artifacts.write_bytes(path, buffer.getvalue())
    kept = [s for s in steps_in(directory) if s <= step][:NUM_KEPT]
    for other in steps_in(directory):
        if other not in kept:
            artifacts.remove(path_of(directory, other))
    return path


def load(path: str) -> dict[str, Any]:
    """Read one checkpoint to the CPU. Raises DamagedCheckpoint; a file that cannot be reached raises OSError."""
    data = artifacts.read_bytes(path)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch.load checks the structure, not the contents
            damaged = archive.testzip()
        if damaged is not None:
            raise DamagedCheckpoint(f"{path}: the CRC of {damaged} does not fit its bytes")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise DamagedCheckpoint(f"{path}: {error}") from error


def newest(directory: str, identity: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The newest undamaged checkpoint and its path; None if there is none. Raises StaleArtifact if it is of something
    else.

    Args:
        directory: local path or URI.
        identity: plain values, with the run's "fingerprint": what the checkpoint must have been made from.
    """
    for step in steps_in(directory):
        path = path_of(directory, step)
        try:
            state = load(path)
            stored = state["identity"]
        except DamagedCheckpoint as error:
            logger.warning("damaged checkpoint passed over, an earlier one is used: %s", error)
            continue
        if stored != identity:
            changes = "; ".join(artifacts.differences(stored, identity))
            raise StaleArtifact(
                f"{path} was trained from {stored.get('fingerprint')}, this run asks for {identity.get('fingerprint')} "
                f"({changes}). Use another directory, or remove {directory} to train anew."
            )
        return path, state
    return None
