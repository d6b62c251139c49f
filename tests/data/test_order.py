"""The order of training: the same rows in the same steps for any number of workers."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.order import TrainingOrder, mix, shuffled
from tests.data.making import row_groups


@st.composite
def orders(draw):
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum))
    num_streams = draw(st.integers(1, min(6, sum(sizes))))
    per_stream = draw(st.integers(1, max(1, sum(sizes) // num_streams)))
    return TrainingOrder(
        row_groups(*sizes), num_streams, num_streams * per_stream, draw(st.integers(0, 99)), draw(st.integers(1, 50))
    )


def epoch_rows(order, epoch):
    """[steps][streams][rows]"""
    return [
        [order.rows(epoch, step, s).tolist() for s in range(order.num_streams)] for step in range(order.steps_per_epoch)
    ]


def flat(steps):
    return [row for step in steps for stream in step for row in stream]


def test_steps_by_hand_without_shuffling_inside():
    # One row group, windows of one row: the sequence is 0..10, the streams are 0..4 and 5..10, a step takes two of
    # each.
    order = TrainingOrder(row_groups(11), num_streams=2, global_batch=4, window=1)
    assert order.steps_per_epoch == 2
    assert epoch_rows(order, 0) == [[[0, 1], [5, 6]], [[2, 3], [7, 8]]]


def test_windows_of_the_streams_end_at_different_steps():
    order = TrainingOrder(row_groups(40), num_streams=2, global_batch=2, window=8)
    assert [order.window_of(0, k) for k in (0, 7, 8)] == [0, 0, 1]
    assert [order.window_of(1, k) for k in (0, 3, 4, 11, 12)] == [0, 0, 1, 1, 2]


@given(orders(), st.integers(0, 3))
def test_each_row_at_most_once_in_an_epoch(order, epoch):
    rows = flat(epoch_rows(order, epoch))
    total = order.row_groups.total_rows
    assert len(rows) == len(set(rows)) == order.steps_per_epoch * order.global_batch > total - order.global_batch
    assert set(rows) <= set(range(total))


@given(orders(), st.integers(1, 6))
def test_the_streams_of_all_workers_are_all_streams_once(order, world_size):
    if world_size > order.num_streams:
        with pytest.raises(ValueError, match=f"{world_size} workers for {order.num_streams} streams"):
            order.streams(0, world_size)
        return
    dealt = [list(order.streams(rank, world_size)) for rank in range(world_size)]
    assert [stream for streams in dealt for stream in streams] == list(range(order.num_streams))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


@given(orders())
def test_a_step_needs_nothing_of_the_steps_before(order):
    last = order.steps_per_epoch - 1
    forward = epoch_rows(order, 1)
    fresh = TrainingOrder(order.row_groups, order.num_streams, order.global_batch, order.seed, order.window_rows)
    assert [fresh.rows(1, last, s).tolist() for s in range(order.num_streams)] == forward[last]
    assert epoch_rows(pickle.loads(pickle.dumps(order)), 1) == forward


def test_epochs_and_seeds_differ():
    order = TrainingOrder(row_groups(*[16] * 8), 2, 8, seed=3, window=32)
    other = TrainingOrder(row_groups(*[16] * 8), 2, 8, seed=4, window=32)
    first, second, third = (flat(epoch_rows(o, e)) for o, e in ((order, 0), (order, 1), (other, 0)))
    assert sorted(first) == sorted(second) == sorted(third) == list(range(128))
    assert first != second
    assert first != third


def test_a_window_mixes_its_row_groups():
    order = TrainingOrder(row_groups(*[16] * 64), 1, 16, window=256)
    step = order.rows(0, 0, 0) // 16
    assert len(set(step.tolist())) > 6  # of 16 row groups in the window; 16 draws hit about 10


def test_the_hash_never_changes():
    # Checkpoints name a step; these numbers give it its rows. SplitMix64 of the state 0 is known: 0xE220A8397B1DCDAF.
    assert mix(0).tolist() == [0xE220A8397B1DCDAF]
    assert shuffled(8, 1, 2).tolist() == [7, 5, 6, 1, 4, 3, 0, 2]
    assert np.unique(mix(7, np.arange(10_000))).size == 10_000


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"global_batch \(10\) must be a multiple of num_streams \(4\)"):
        TrainingOrder(row_groups(100), 4, 10)
    with pytest.raises(ValueError, match=r"8 rows, fewer than one step's global_batch \(16\)"):
        TrainingOrder(row_groups(8), 4, 16)
    with pytest.raises(ValueError, match=r"rank \(2\) must lie in 0..1"):
        TrainingOrder(row_groups(8), 4, 4).streams(2, 2)
