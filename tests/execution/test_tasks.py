"""Independent pieces of work: every result once, a dead worker's piece again, errors as themselves."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pipeline.execution.tasks import run_tasks

pytestmark = pytest.mark.ray


def squared(x: int) -> int:
    return x * x


def dies_once(marker: str) -> str:
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def fails(x: int) -> int:
    raise ValueError(f"{x} is not allowed")


def test_every_key_gets_its_result(ray_cluster: None):
    assert dict(run_tasks(squared, {f"{x}": (x,) for x in range(5)})) == {"0": 0, "1": 1, "2": 4, "3": 9, "4": 16}
    assert dict(run_tasks(squared, {})) == {}


def test_the_piece_of_a_dead_worker_is_done_again(ray_cluster: None, tmp_path: Path):
    assert list(run_tasks(dies_once, {"a": (str(tmp_path / "marker"),)})) == [("a", "done")]


def test_an_error_comes_as_itself(ray_cluster: None):
    with pytest.raises(ValueError, match="7 is not allowed"):
        list(run_tasks(fails, {"a": (7,), "b": (7,)}))
