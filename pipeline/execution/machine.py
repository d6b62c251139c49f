"""What a process has to be told about the machine that it runs on, once."""

from __future__ import annotations

import ctypes
import os
import socket
from contextlib import suppress

import ray

COLLECTIVE_TIMEOUT_S = 600
"""For a collective of a team, or of a training, one of whose processes does not come."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Let malloc keep the memory that tensors give back, for the next ones.

    By its default glibc hands large blocks back to the kernel at once, which clears each page anew for the next layer: of a forward of
    EfficientNet-Lite0 (64 rows of 128 px, one thread) that was half of the CPU time.
    """
    _malloc_options({M_MMAP_THRESHOLD: 1 << 30, M_TRIM_THRESHOLD: (1 << 31) - 1})


def give_back_memory() -> None:
    """The other way, where memory is what is short: every block of a megabyte goes back to the kernel when it is freed.

    By its default glibc raises that limit to the largest block it has seen, and weights that were gathered and given back leave a heap with
    holes: two workers that trained a ViT-B together kept 1,500 MB each in place of 720.
    """
    _malloc_options({M_MMAP_THRESHOLD: 1 << 20})


def _malloc_options(options: dict[int, int]) -> None:
    with suppress(OSError, AttributeError):  # not every libc has it
        libc = ctypes.CDLL(None)
        for option, value in options.items():
            libc.mallopt(option, value)


def free_port() -> int:
    """One on which nobody listens now."""
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


def bind_gloo() -> None:
    """GLOO_SOCKET_IFNAME becomes the interface with the node's address in the cluster, unless it is set.

    Gloo itself takes what the host's own name stands for, which on many machines is 127.0.1.1: others cannot reach that.
    """
    import psutil  # Ray's own copy, on the path once ray is imported

    address = ray.util.get_node_ip_address()
    for name, found in psutil.net_if_addrs().items():
        if any(one.address == address for one in found):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
