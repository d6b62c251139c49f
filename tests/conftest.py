"""One Ray for the whole session, one thread for each computation, no network."""

from __future__ import annotations

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("default")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with three CPUs, shared by every test that needs one."""
    import ray

    from pipeline.execution.pool import connect

    connect(address=None, num_cpus=3)
    yield
    ray.shutdown()
