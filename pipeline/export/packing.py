"""Tensors with many zeros, stored as the values that are not zero and one bit for each place.

With a fraction z of zeros, a float32 weight takes 4 (1 - z) + 1/8 bytes on average instead of 4. The way back is
`models.standalone.unpacked`, which the artifact carries with it. Zero is what has no bit set: -0.0 and NaN are values.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeline.models.standalone import INTEGERS, PLACES, VALUES
from pipeline.pruning.masks import pack

LARGEST_SHARE = 0.95
"""Of the bytes of the dense form: what saves less stays readable for everybody."""
HEADER_BYTES = 128
"""About what the second name, its type and its place take in the head of a safetensors file."""


def packed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The tensors as they are stored, and the shapes of those that were taken apart.

    Args:
        tensors: by name, on the CPU, contiguous.

    Returns:
        Tensors by name: those with many zeros as `NAME:values` [number of values] and `NAME:places`, uint8 [ceil(numel / 8)], in
        which bit i % 8 of byte i // 8 tells whether element i of the flat tensor is there; all others as they are.
    """
    stored, shapes = {}, {}
    for name, tensor in tensors.items():
        apart = _apart(tensor)
        if apart is None or not {name + VALUES, name + PLACES}.isdisjoint(tensors):
            stored[name] = tensor
        else:
            stored[name + VALUES], stored[name + PLACES] = apart
            shapes[name] = list(tensor.shape)
    return stored, shapes


def _apart(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Values and places, if they are smaller."""
    size = tensor.element_size()
    if size not in INTEGERS:
        return None
    flat = tensor.reshape(-1)
    there = flat.view(INTEGERS[size]) != 0
    num_bytes = int(there.sum()) * size + -(-len(flat) // 8) + HEADER_BYTES
    if num_bytes > LARGEST_SHARE * len(flat) * size:
        return None
    return flat[there], pack(there)


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Of the values alone."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
