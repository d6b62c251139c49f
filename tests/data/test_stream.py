"""Training samples: the same for any number of workers and loader processes, from any step on."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.batches import BadRowError
from pipeline.data.order import TrainingOrder
from pipeline.data.rows import open_source
from pipeline.data.source import DataError
from pipeline.data.stream import Augmentation, StreamReader, TrainingRows, blocks_of, own_randomness, training_loader
from tests.data.making import FakeSource, image, row_groups, write_parquet

SMALL = Augmentation(size=8, mean=(0, 0, 0), std=(1, 1, 1))


@pytest.fixture
def source(tmp_path):
    """40 rows in row groups of 6; row i has the red value i and the label i modulo 10."""
    images = [image(i) for i in range(40)]
    return open_source(
        str(write_parquet(tmp_path / "a.parquet", images, [i % 10 for i in range(40)], rows_per_group=6))
    )


@pytest.fixture
def order(source):
    return TrainingOrder(source.row_groups, num_streams=4, global_batch=8, seed=1, window=7)


def loader_of(source, order, **options):
    return training_loader(source, order, options.pop("augmentation", SMALL), num_classes=10, **options)


def equal(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


def test_a_step_has_the_rows_of_the_order(source, order):
    flat = Augmentation(
        size=8, mean=(0, 0, 0), std=(1, 1, 1), scale=(1.0, 1.0), ratio=(1.0, 1.0), interpolation="bilinear"
    )
    for step, (images, labels) in enumerate(loader_of(source, order, augmentation=flat)):
        rows = np.concatenate([order.rows(0, step, s) for s in range(4)])
        assert (images[:, 0, 0, 0] * 255).round().long().tolist() == rows.tolist()
        assert labels.tolist() == (rows % 10).tolist()
    assert step == 4


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_workers_together_have_the_samples_of_one(source, order, world_size):
    alone = list(loader_of(source, order, epoch=2))
    ranks = [list(loader_of(source, order, epoch=2, rank=r, world_size=world_size)) for r in range(world_size)]
    together = [(torch.cat([i for i, _ in step]), torch.cat([n for _, n in step])) for step in zip(*ranks, strict=True)]
    assert equal(together, alone)


@pytest.mark.parametrize("start_step", [0, 1, 3, 5])
def test_resuming_gives_the_samples_that_were_left(source, order, start_step):
    whole = list(loader_of(source, order, epoch=1))
    resumed = loader_of(source, order, epoch=1, start_step=start_step)
    assert len(resumed) == 5 - start_step
    assert equal(list(resumed), whole[start_step:])


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(sum), st.integers(1, 4), st.integers(1, 20), st.data()
)
def test_readers_give_what_the_order_says_from_any_step_and_read_no_row_group_twice(sizes, num_streams, window, data):
    source = FakeSource(row_groups(*sizes))
    total = source.num_rows
    num_streams = min(num_streams, total)
    batch = num_streams * data.draw(st.integers(1, total // num_streams))
    order = TrainingOrder(source.row_groups, num_streams, batch, seed=5, window=window)
    start = data.draw(st.integers(0, order.steps_per_epoch))
    stream = data.draw(st.integers(0, num_streams - 1))
    with ThreadPoolExecutor(1) as executor:
        reader = StreamReader(source, order, 0, stream, executor)
        taken = [[int(row.image) for _, row in reader.take(step)] for step in range(start, order.steps_per_epoch)]
    assert taken == [order.rows(0, step, stream).tolist() for step in range(start, order.steps_per_epoch)]
    assert len(source.loads) == len(set(source.loads))


def test_blocks_of_streams_by_hand():
    assert blocks_of(range(8), 1) == [range(8)]
    assert blocks_of(range(8), 3) == [range(2), range(2, 5), range(5, 8)]
    assert blocks_of(range(4, 6), 4) == [range(4, 5), range(5, 6)]  # processes 0 and 2 take turns with stream 4
    assert blocks_of(range(2), 3) == [range(2)]


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 8])
def test_loader_processes_in_turn_give_the_same_samples(source, order, processes, monkeypatch):
    # What a DataLoader does, without its processes: Share after Share from one process after the other.
    def of_process(index):
        iterator = iter(TrainingRows(source, order, SMALL, num_classes=10, start_step=1))
        while True:
            info = SimpleNamespace(id=index, num_workers=processes)
            with monkeypatch.context() as patch:  # read once, when the iterator starts
                patch.setattr("pipeline.data.stream.get_worker_info", lambda info=info: info)
                share = next(iterator, None)
            if share is None:
                return
            yield share

    num_blocks = len(blocks_of(range(4), processes))
    iterators = [of_process(index) for index in range(processes)]
    shares = [next(iterators[turn % processes]) for turn in range(4 * num_blocks)]
    assert [next(iterator, None) for iterator in iterators] == [None] * processes
    steps = [shares[i : i + num_blocks] for i in range(0, len(shares), num_blocks)]
    together = [(torch.cat([s.images_nCHW for s in step]), torch.cat([s.labels_n for s in step])) for step in steps]
    assert equal(together, list(loader_of(source, order, start_step=1)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on one core
def test_two_loader_processes_give_the_same_samples(source, order):
    augmentation = Augmentation(size=8, auto_augment="rand-m9-mstd0.5-inc1", random_erase=0.5, color_jitter=0.3)
    inside = list(loader_of(source, order, augmentation=augmentation))
    outside = list(loader_of(source, order, augmentation=augmentation, num_workers=2))
    assert equal(inside, outside)


def test_augmentation_depends_on_the_epoch_and_the_seed(source):
    def first_epochs(seed):
        order = TrainingOrder(source.row_groups, 1, 40, seed=seed, window=1)
        loaders = [loader_of(source, order, epoch=epoch) for epoch in (0, 0, 1)]
        return [
            dict(zip((i[:, 0].amax((1, 2)) * 255).round().tolist(), i, strict=True)) for ((i, _),) in map(list, loaders)
        ]

    once, again, later = first_epochs(0)
    other = first_epochs(1)[0]
    assert set(once) == set(later) == set(map(float, range(40)))
    assert all(torch.equal(once[row], again[row]) for row in once)
    assert sum(torch.equal(once[row], later[row]) for row in once) < 5
    assert sum(torch.equal(once[row], other[row]) for row in once) < 5


def test_the_outer_randomness_is_not_touched_and_does_not_matter(source, order):
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seed():
        random.seed(1), np.random.seed(2), torch.manual_seed(3)

    seed()
    expected = [draws(), draws(), draws()]
    seed()
    batches = iter(loader_of(source, order))
    got = [draws()]
    first = next(batches)
    got.append(draws())
    second = next(batches)
    got.append(draws())
    assert got == expected
    assert equal([first, second], list(loader_of(source, order))[:2])


def test_own_randomness_is_given_back_after_an_error():
    def fail():
        with own_randomness():
            torch.manual_seed(5)
            raise KeyError

    before = torch.get_rng_state()
    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.get_rng_state(), before)


# --- bad rows --------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """Row 5 is no image, row 9 has a label that does not exist."""
    images = [image(i) for i in range(16)]
    labels = list(range(9)) + [77] + [0] * 6
    images[5] = b"not an image"
    return open_source(str(write_parquet(tmp_path / "bad.parquet", images, labels)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bad_row_stops_training_by_name(damaged, num_workers):
    order = TrainingOrder(damaged.row_groups, 2, 4, window=1)
    with pytest.raises(BadRowError, match=r"bad\.parquet, row (5|9)"):
        list(loader_of(damaged, order, num_workers=num_workers))


def test_bad_rows_are_skipped_counted_and_shift_no_other(damaged):
    order = TrainingOrder(damaged.row_groups, 2, 4, window=1)
    loader = loader_of(damaged, order, on_bad_row="skip", max_bad_rows=2)
    sizes = [len(labels) for _, labels in loader]
    rows = [np.concatenate([order.rows(0, step, s) for s in range(2)]) for step in range(4)]
    assert sizes == [4 - len({5, 9} & set(step.tolist())) for step in rows]
    assert sorted(bad.row for bad in loader.bad_rows) == [5, 9]
    assert {bad.cause for bad in loader.bad_rows if bad.row == 9} == {"label 77 is not in 0..9"}


def test_too_many_bad_rows_end_the_training(damaged):
    order = TrainingOrder(damaged.row_groups, 2, 4, window=1)
    with pytest.raises(
        DataError, match=r"2 rows of this epoch are bad, more than data\.max_bad_fraction.*bad\.parquet"
    ):
        list(loader_of(damaged, order, on_bad_row="skip", max_bad_rows=1))


def test_a_share_may_be_empty(tmp_path):
    source = open_source(str(write_parquet(tmp_path / "a.parquet", [None] * 4, [0] * 4)))
    order = TrainingOrder(source.row_groups, 2, 2)
    images, labels = next(iter(loader_of(source, order, on_bad_row="skip", max_bad_rows=2)))
    assert (images.shape, labels.shape) == ((0, 3, 8, 8), (0,))


# --- hygiene ---------------------------------------------------------------------------------------------------------


def test_closing_early_leaves_no_threads(source, order):
    before = set(threading.enumerate())
    batches = iter(loader_of(source, order))
    next(batches)
    batches.close()
    assert set(threading.enumerate()) == before


def test_an_error_while_reading_comes_out(monkeypatch):
    source = FakeSource(row_groups(4, 4))

    def lost(self, file, row_group):
        raise OSError("connection lost")

    monkeypatch.setattr(FakeSource, "load", lost)
    order = TrainingOrder(source.row_groups, 1, 2)
    with pytest.raises(OSError, match="connection lost"):
        list(loader_of(source, order))


def test_a_reader_holds_no_more_than_two_windows(order):
    source = FakeSource(row_groups(*[10] * 100))
    order = TrainingOrder(source.row_groups, 1, 10, window=50)
    with ThreadPoolExecutor(1) as executor:
        reader = StreamReader(source, order, 0, 0, executor)
        for step in range(order.steps_per_epoch):
            reader.take(step)
            ahead = reader._next[1].result()[1] if reader._next else []
            held = [item for item in [*reader._rows, *ahead] if item is not None]
            assert len(held) <= 75  # the second half of one window and the whole next one
            assert len(source.loads) * 10 <= 10 * (step + 1) + 100


def test_what_does_not_fit_is_named(source, order):
    with pytest.raises(ValueError, match=r"start_step \(6\) must lie in 0..5"):
        TrainingRows(source, order, SMALL, num_classes=10, start_step=6)
    with pytest.raises(ValueError, match="5 workers for 4 streams"):
        loader_of(source, order, rank=4, world_size=5)
    with pytest.raises(ValueError, match="on_bad_row is 'ignore'"):
        loader_of(source, order, on_bad_row="ignore")
