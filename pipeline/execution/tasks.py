"""Independent pieces of work on the connected cluster: one function, many arguments, results as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import RayTaskError

from pipeline.execution.machine import keep_freed_memory

Key = TypeVar("Key")
Result = TypeVar("Result")
MAX_RETRIES = 3
"""Deaths of a worker that one piece of work survives."""


def run_tasks(
    function: Callable[..., Result], arguments: Mapping[Key, tuple[Any, ...]], *, threads: int = 1
) -> Iterator[tuple[Key, Result]]:
    """Call `function(*arguments[key])` for every key, each in some worker with `threads` CPUs; yield (key, result) in the order of ends.

    A worker that dies is replaced and its piece done again, so `function` must be safe to repeat. What it raises is raised here.
    """

    @ray.remote(num_cpus=threads, max_retries=MAX_RETRIES)
    def work(*values: Any) -> Any:
        torch.set_num_threads(threads)
        keep_freed_memory()
        return function(*values)

    pending = {work.remote(*values): key for key, values in arguments.items()}
    while pending:
        (ready, *_), _ = ray.wait(list(pending), num_returns=1)
        key = pending.pop(ready)
        try:
            yield key, ray.get(ready)
        except RayTaskError as error:
            for other in pending:
                ray.cancel(other, force=True)
            raise error.cause if isinstance(error.cause, Exception) else error from None
