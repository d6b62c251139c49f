"""Decoding, micro-batches, and rows that cannot be used."""

from __future__ import annotations

import io
import pickle
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch.testing import assert_close

from pipeline.data.batches import BadRow, BadRowError, Decoder, unit_batches
from pipeline.data.images import NotAnImage, decode_rgb
from pipeline.data.rows import open_source
from pipeline.data.units import Units
from tests.data.making import FakeSource, image, row_groups, write_parquet, write_rows

PLAIN = Decoder(8, mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.0)


def photograph(size=(37, 29)):
    """A JPEG with some structure."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([127 + 120 * np.sin(x / 3 + y / 5), 127 + 120 * np.cos(x * y / 40), (x * 7 + y * 3) % 256], -1)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def batches_of(path, *, micro_batch=3, num_classes=10, on_bad_row="stop", threads=2, rows_per_unit=100, decoder=PLAIN):
    source = open_source(str(path))
    unit = Units(source.row_groups, rows_per_unit)[0]
    return unit_batches(
        source, unit, decoder, micro_batch=micro_batch, num_classes=num_classes, on_bad_row=on_bad_row, threads=threads
    )


def write_damaged(tmp_path, **damage):
    """Eight rows in one row group, some of them replaced."""
    images: list = [image(i) for i in range(8)]
    labels: list = list(range(8))
    for name, value in damage.items():
        column, index = name.split("_")
        {"image": images, "label": labels}[column][int(index)] = value
    return write_parquet(tmp_path / "a.parquet", images, labels, rows_per_group=8)


# --- the decoder -----------------------------------------------------------------------------------------------------


def test_pixels_are_scaled_and_normalised_by_hand():
    flat = io.BytesIO()
    Image.new("RGB", (4, 4), (255, 51, 0)).save(flat, "PNG")
    pixels = Decoder(2, mean=(0.5, 0.5, 0.0), std=(0.5, 0.25, 1.0))(flat.getvalue())
    assert pixels.shape == (3, 2, 2)
    assert_close(pixels[:, 0, 0], torch.tensor([1.0, -1.2, 0.0]))  # (1 - 0.5) / 0.5, (0.2 - 0.5) / 0.25, 0


def test_the_memory_of_an_image_changes_no_bit():
    decoder, data = Decoder(16), photograph()
    planes_CHW, pixels_HWC = torch.empty(3, 16, 16), torch.empty(16, 16, 3)
    decoder.decode_into_(planes_CHW, data)
    decoder.decode_into_(pixels_HWC.permute(2, 0, 1), data)
    assert torch.equal(planes_CHW, pixels_HWC.permute(2, 0, 1))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(37, 29), (20, 90), (16, 16)])
def test_close_to_timms_transform(interpolation, size):
    # Same sizes and crop; the two resize kernels round differently. 2 % of the range is about 5 of 255 levels.
    data = photograph(size)
    theirs = create_transform(16, interpolation=interpolation, crop_pct=0.9, mean=(0, 0, 0), std=(1, 1, 1))
    ours = Decoder(16, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation, crop_pct=0.9)
    assert_close(ours(data), theirs(Image.open(io.BytesIO(data)).convert("RGB")), atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats(kind):
    assert decode_rgb(image(7, (5, 6), kind)).shape == (3, 6, 5)


@pytest.mark.parametrize(
    ("mode", "kind"), [("L", "JPEG"), ("L", "PNG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("1", "PNG")]
)
def test_modes_become_rgb(mode, kind):
    pixels = decode_rgb(image(7, (5, 6), kind, mode))
    assert (pixels.shape, pixels.dtype) == ((3, 6, 5), torch.uint8)


def test_sixteen_bits_become_eight():
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 2), 0x80FF, np.uint16)).save(buffer, "PNG")
    assert decode_rgb(buffer.getvalue()).unique().tolist() == [0x80]


def test_a_jpeg_is_decoded_to_the_same_pixels_as_by_pil():
    data = photograph()
    assert np.array_equal(decode_rgb(data).permute(1, 2, 0), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (photograph()[:300], "truncated"),
        (image(1)[:60], "cannot be decoded"),
        (b"this is no image", "begins with b'this is no i'"),
        (b"", "no bytes"),
    ],
)
def test_what_is_no_image_says_why(data, words):
    with pytest.raises(NotAnImage, match=words):
        decode_rgb(data)


def test_an_absurdly_long_image_is_refused_before_it_takes_gigabytes():
    with pytest.raises(NotAnImage, match="20000 x 1 pixels"):
        Decoder(224)(image(1, (20000, 1)))


def test_decoder_settings_that_do_not_fit():
    with pytest.raises(ValueError, match=r"'cubic'\. Known: nearest, bilinear, bicubic, lanczos"):
        Decoder(8, interpolation="cubic")
    with pytest.raises(ValueError, match=r"crop_pct \(1.5\)"):
        Decoder(8, crop_pct=1.5)
    with pytest.raises(ValueError, match="std"):
        Decoder(8, std=(1, 1, 0))
    with pytest.raises(ValueError, match=r"on_bad_row is 'ignore'\. Known: stop, skip"):
        next(unit_batches(FakeSource(row_groups(1)), None, PLAIN, micro_batch=1, num_classes=1, on_bad_row="ignore"))


# --- micro-batches ---------------------------------------------------------------------------------------------------


def test_micro_batches_follow_the_rows(tmp_path):
    batches = list(batches_of(write_rows(tmp_path / "a.parquet", 8, rows_per_group=8)))
    assert [batch.labels_N.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [batch.images_NCHW.shape for batch in batches] == [(3, 3, 8, 8), (3, 3, 8, 8), (2, 3, 8, 8)]
    reds = torch.cat([batch.images_NCHW[:, 0, 0, 0] for batch in batches])
    assert_close(reds * 255, torch.arange(8.0))
    for images_NCHW in (batch.images_NCHW for batch in batches):
        assert images_NCHW.dtype == torch.float32
        assert images_NCHW.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_the_same_bits_for_any_number_of_threads_and_on_every_call(tmp_path, threads):
    path = write_parquet(
        tmp_path / "a.parquet", [photograph((30 + i, 40)) for i in range(8)], range(8), rows_per_group=8
    )
    decoder = Decoder(16)
    batches = [list(batches_of(path, threads=n, decoder=decoder)) for n in (threads, threads)]
    alone = torch.stack([decoder(photograph((30 + i, 40))) for i in range(8)])
    for got in batches:
        assert torch.equal(torch.cat([batch.images_NCHW for batch in got]), alone)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        ({"image_4": photograph()[:300]}, "truncated"),
        ({"image_4": b"<html>not found</html>"}, "begins with b'<html>not fo'"),
        ({"image_4": None}, "the image is null"),
        ({"image_4": b""}, "no bytes"),
        ({"label_4": None}, "the label is null"),
        ({"label_4": 10}, "label 10 is not in 0..9"),
        ({"label_4": -1}, "label -1 is not in 0..9"),
    ],
)
def test_a_bad_row_stops_by_name_or_is_skipped(tmp_path, damage, cause):
    path = write_damaged(tmp_path, **damage)
    with pytest.raises(BadRowError) as caught:
        list(batches_of(path))
    error = caught.value
    assert (error.file, error.row_group, error.row) == (str(path), 0, 4)
    assert cause in error.cause
    assert all(text in str(error) for text in (str(path), "row 4", cause, "data.on_bad_row=skip"))

    batches = list(batches_of(path, on_bad_row="skip"))
    assert [batch.labels_N.tolist() for batch in batches] == [[0, 1, 2], [3, 5], [6, 7]]  # borders stay where they were
    assert_close(batches[1].images_NCHW[:, 0, 0, 0] * 255, torch.tensor([3.0, 5.0]))
    assert [batch.bad_rows for batch in batches] == [(), (BadRow(str(path), 0, 4, error.cause),), ()]


def test_the_first_bad_row_is_named_whatever_thread_finds_its_own_first(tmp_path):
    path = write_damaged(tmp_path, image_6=None, image_3=b"x", label_5=99)
    for _ in range(5):
        with pytest.raises(BadRowError, match="row 3"):
            list(batches_of(path, micro_batch=8, threads=3))


def test_a_micro_batch_of_bad_rows_is_empty(tmp_path):
    path = write_damaged(tmp_path, image_0=b"x", image_1=None, label_2=99)
    first = next(iter(batches_of(path, on_bad_row="skip")))
    assert first.images_NCHW.shape == (0, 3, 8, 8)
    assert first.labels_N.dtype == torch.int64
    assert [bad.row for bad in first.bad_rows] == [0, 1, 2]


def test_a_bad_row_counts_from_the_beginning_of_its_file(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [image(0)] * 5 + [None], range(6), rows_per_group=4)
    source = open_source(str(path))
    with pytest.raises(BadRowError) as caught:
        list(unit_batches(source, Units(source.row_groups, 4)[1], PLAIN, micro_batch=4, num_classes=10))
    assert (caught.value.row_group, caught.value.row) == (1, 5)


def test_bad_row_error_survives_pickling():
    error = pickle.loads(pickle.dumps(BadRowError("a.parquet", 1, 5, "the image is null")))
    assert (error.file, error.row_group, error.row, error.cause) == ("a.parquet", 1, 5, "the image is null")
    assert "a.parquet, row 5" in str(error)


def test_closing_early_leaves_no_threads(tmp_path):
    before = set(threading.enumerate())
    batches = batches_of(write_rows(tmp_path / "a.parquet", 8, rows_per_group=8), micro_batch=1, threads=3)
    next(batches)
    assert len(threading.enumerate()) > len(before)
    batches.close()
    assert set(threading.enumerate()) == before


def test_an_error_in_a_thread_comes_out_and_leaves_no_threads(tmp_path, monkeypatch):
    def broken(self, out, data):
        raise MemoryError("no room")

    monkeypatch.setattr(Decoder, "decode_into_", broken)
    before = set(threading.enumerate())
    with pytest.raises(MemoryError, match="no room"):
        list(batches_of(write_rows(tmp_path / "a.parquet", 8, rows_per_group=8)))
    assert set(threading.enumerate()) == before


def test_no_more_is_decoded_than_three_micro_batches_ahead(tmp_path, monkeypatch):
    decoded = []
    original = Decoder.decode_into_
    monkeypatch.setattr(Decoder, "decode_into_", lambda self, out, data: decoded.append(1) or original(self, out, data))
    batches = batches_of(write_rows(tmp_path / "a.parquet", 40, rows_per_group=40), micro_batch=2, threads=2)
    for taken in range(1, 10):
        next(batches)
        assert len(decoded) <= 2 * (taken + 2)
    batches.close()


def test_without_torchvisions_operator_pil_gives_the_same_pixels(monkeypatch):
    expected = decode_rgb(photograph())
    monkeypatch.setattr("pipeline.data.images._OPERATOR", None)
    assert torch.equal(decode_rgb(photograph()), expected)
    with pytest.raises(NotAnImage, match="begins with b'text'"):
        decode_rgb(b"text")
