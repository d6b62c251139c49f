"""From the bytes of an image to pixels. One decoder for scoring, evaluation and training."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

with contextlib.suppress(ImportError):
    import torchvision.io  # noqa: F401 - registers torch.ops.image

# torchvision 0.29 deprecates its decoders for TorchCodec, and its Python wrapper warns on every call; the operator
# itself is a third faster than PIL on JPEG and gives the same pixels. A torchvision without it leaves the work to
# PIL.
_OPERATOR: Callable[..., Tensor] | None = getattr(torch.ops.image, "decode_image", None)
_RGB = 3  # torchvision's ImageReadMode.RGB

INTERPOLATIONS = {
    "nearest": InterpolationMode.NEAREST,
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "lanczos": InterpolationMode.LANCZOS,
}
MAX_RESIZED_PIXELS = 1 << 26
"""Larger resized images come from absurd shapes (1 x 20,000 pixels) and would take gigabytes."""


class NotAnImage(ValueError):
    """Bytes that no decoder reads as an image; the message is the cause."""


def decode_rgb(data: bytes) -> Tensor:
    """uint8 [3, H, W] of an encoded image: JPEG, PNG, WebP and GIF by torchvision, other formats by PIL.

    Grey and CMYK become RGB, transparency is dropped, 16 bits become 8, of an animation the first frame counts. An
    orientation in the EXIF data is not applied, as timm's own data sets do not. Raises NotAnImage with the cause.
    """
    if not data:
        raise NotAnImage("no bytes")
    if _OPERATOR is None:
        return _decode_with_pil(data)
    try:
        pixels = _OPERATOR(torch.frombuffer(bytearray(data), dtype=torch.uint8), _RGB)
    except RuntimeError as error:
        return _decode_with_pil(data, error)
    if pixels.ndim == 4:
        pixels = pixels[0]
    if pixels.dtype == torch.uint16:
        pixels = (pixels.to(torch.int32) >> 8).to(torch.uint8)
    if pixels.numel() == 0:
        raise NotAnImage(f"an image of {pixels.shape[-1]} x {pixels.shape[-2]} pixels")
    return pixels


def _decode_with_pil(data: bytes, first_error: Exception | None = None) -> Tensor:
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.array(image.convert("RGB"))
    except (
        Exception
    ) as error:  # PIL's readers raise whatever their format's parser does: OSError, SyntaxError, struct.error ...
        text = f"begins with {data[:12]!r}" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise NotAnImage(f"{len(data)} bytes that cannot be decoded: {text}{_last_words(first_error)}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _last_words(error: Exception | None) -> str:
    """torchvision's message without the path of its source file."""
    if error is None:
        return ""
    line = str(error).splitlines()[0]
    return f" ({line.rpartition('.cpp:')[2].partition(', ')[2] or line})"


@dataclass(frozen=True)
class Normalise:
    """Pixels 0..255 to numbers with the mean and deviation that a network was trained with."""

    mean: tuple[float, ...]
    """Per channel, of pixels scaled to 0..1."""
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):
            raise ValueError(
                f"mean {self.mean} and std {self.std} must have three numbers each, for R, G and B, and std must be "
                "above 0."
            )

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, float32 [3] each."""
        std = torch.tensor(self.std, dtype=torch.float64)
        mean = torch.tensor(self.mean, dtype=torch.float64)
        return (1 / (255 * std)).float(), (-mean / std).float()

    def into_(self, out_CHW: Tensor, pixels_CHW: Tensor) -> None:
        """Write into float32 `out_CHW`, whose memory format changes no bit. Multiplication and addition are two
        operations, each rounded by itself: fused, their bits would depend on how a processor's vector units cut the
        tensor."""
        scale_C, shift_C = self._factors
        out_HWC, pixels_HWC = out_CHW.permute(1, 2, 0), pixels_CHW.permute(1, 2, 0)
        if out_HWC.is_contiguous():
            # Three channels are too few for a vector, a row of width * 3 numbers is not: seven times as fast as the
            # general case on this memory.
            width = out_CHW.shape[-1]
            out_HWC.flatten(1).copy_(pixels_HWC.flatten(1)).mul_(scale_C.repeat(width)).add_(shift_C.repeat(width))
        else:
            out_CHW.copy_(pixels_CHW).mul_(scale_C[:, None, None]).add_(shift_C[:, None, None])


@dataclass(frozen=True)
class Decoder:
    """Bytes of an image to what the network sees in evaluation: shorter side to size / crop_pct, centre crop,
    normalised.

    The same bits on every call and from any thread. Against timm's transform on PIL images the sizes and the crop are
    the same; the resized pixels (torchvision's kernel, with antialiasing) differ from PIL's by at most a few of 255
    levels.

    Args:
        size: height and width in pixels.
        mean, std: per channel, of pixels scaled to 0..1.
        interpolation: key of INTERPOLATIONS.
        crop_pct: share of the resized image's shorter side that the crop keeps.
    """

    size: int
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is {self.interpolation!r}. Known: {', '.join(INTERPOLATIONS)}.")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct ({self.crop_pct}) must lie above 0 and not above 1.")
        if self.size < 1:
            raise ValueError(f"size ({self.size}) must be at least 1 pixel.")
        _ = self.normalise

    @cached_property
    def normalise(self) -> Normalise:
        return Normalise(tuple(self.mean), tuple(self.std))

    def __call__(self, data: bytes) -> Tensor:
        """float32 [3, size, size]. Raises NotAnImage."""
        out = torch.empty(3, self.size, self.size)
        self.decode_into_(out, data)
        return out

    def decode_into_(self, out_CHW: Tensor, data: bytes) -> None:
        """The same, into memory that is there."""
        pixels = decode_rgb(data)
        shorter = math.floor(self.size / self.crop_pct)
        height, width = pixels.shape[-2:]
        if shorter * shorter * max(height, width) / min(height, width) > MAX_RESIZED_PIXELS:
            raise NotAnImage(
                f"an image of {width} x {height} pixels is too long to resize its shorter side to {shorter}"
            )
        pixels = F.resize(pixels, [shorter], interpolation=INTERPOLATIONS[self.interpolation], antialias=True)
        self.normalise.into_(out_CHW, F.center_crop(pixels, [self.size]))
