"""The coordinator's decisions, event by event."""

from __future__ import annotations

import heapq
from collections import Counter

import numpy as np
import pytest

from pipeline.execution.coordinator import Abort, Coordinator, Done, Finish, Joined, Lost, Spawn, Tick, Work
from tests import simulation


def fresh(num_units: int, **options) -> Coordinator:
    return Coordinator(np.zeros(num_units, dtype=bool), **options)


# --- how much a worker is given ----------------------------------------------------------------------------------------


def test_the_first_lease_is_one_unit_and_the_next_fits_the_commit_interval():
    coordinator = fresh(100, commit_interval_s=10.0)
    assert coordinator.handle(Joined("a", 0.0)) == [Work("a", 1, (0,))]
    assert coordinator.handle(Done("a", 1, 2.0)) == [Work("a", 2, (1, 2, 3, 4, 5))]


def test_each_worker_is_given_what_it_does_in_a_commit_interval():
    coordinator = fresh(100, commit_interval_s=8.0)
    coordinator.handle(Joined("fast", 0.0))
    coordinator.handle(Joined("slow", 0.0))
    assert coordinator.handle(Done("fast", 1, 1.0)) == [Work("fast", 3, tuple(range(2, 10)))]  # 8 s at 1 s
    assert coordinator.handle(Done("slow", 2, 4.0)) == [Work("slow", 4, (10, 11))]  # 8 s at 4 s


def test_units_that_were_quick_make_a_lease_eight_times_as_long_at_most():
    coordinator = fresh(10_000, commit_interval_s=30.0)
    coordinator.handle(Joined("a", 0.0))
    assert coordinator.handle(Done("a", 1, 0.001)) == [Work("a", 2, tuple(range(1, 9)))]


def test_leases_shrink_towards_the_end_so_that_workers_end_together():
    coordinator = fresh(9, commit_interval_s=100.0)
    coordinator.handle(Joined("a", 0.0))
    coordinator.handle(Joined("b", 0.0))
    assert coordinator.handle(Done("a", 1, 1.0)) == [Work("a", 3, (2, 3))]  # 7 s of work, 2 workers: half of 3.5 s


def test_committed_units_are_not_done_again():
    coordinator = Coordinator(np.array([True, False, True]))
    assert coordinator.num_done == 2
    assert coordinator.handle(Joined("a", 0.0)) == [Work("a", 1, (1,))]
    assert coordinator.handle(Done("a", 1, 1.0)) == [Finish()]
    assert coordinator.handle(Joined("b", 1.0)) == []


# --- what is lost ------------------------------------------------------------------------------------------------------


def with_a_lease_of_16() -> Coordinator:
    """Worker a holds units 18 to 33 as lease 5, b units 10 to 17 as lease 4; both need a second for a unit."""
    coordinator = fresh(1000, commit_interval_s=16.0)
    coordinator.handle(Joined("a", 0.0))
    coordinator.handle(Joined("b", 0.0))
    coordinator.handle(Done("a", 1, 1.0))
    assert coordinator.handle(Done("b", 2, 1.0)) == [Work("b", 4, tuple(range(10, 18)))]
    assert coordinator.handle(Done("a", 3, 9.0)) == [Work("a", 5, tuple(range(18, 34)))]
    return coordinator


def test_a_lost_lease_comes_back_in_eighths_and_an_eighth_unit_by_unit():
    coordinator = with_a_lease_of_16()
    assert coordinator.handle(Lost("a", "killed", 10.0)) == [Spawn("killed")]
    assert coordinator.handle(Done("b", 4, 11.0)) == [Work("b", 6, (18, 19))]
    assert coordinator.handle(Lost("b", "killed", 12.0)) == [Spawn("killed")]
    coordinator.handle(Joined("c", 100.0))
    given = [(20,)]  # a new worker learns its speed with one unit
    for lease in range(7, 15):
        [work] = coordinator.handle(Done("c", lease, 100.0 + 2 * lease))
        given.append(work.units)
    assert given == [(20,), (21,), (22, 23), (24, 25), (26, 27), (28, 29), (30, 31), (32, 33), (18,)]
    assert coordinator.num_lost == 2


def test_a_lost_lease_waits_for_a_second():
    coordinator = with_a_lease_of_16()
    coordinator.handle(Lost("a", "killed", 10.5))
    assert coordinator.handle(Done("b", 4, 11.0)) == [
        Work("b", 6, tuple(range(34, 47)))
    ]  # fresh ones: 16 s at 8 in 10 s
    assert coordinator.handle(Joined("c", 11.5)) == [Work("c", 7, (18,))]


def test_a_slow_worker_takes_a_part_of_a_piece_and_the_rest_waits_for_the_next():
    coordinator = with_a_lease_of_16()
    coordinator.handle(Lost("a", "killed", 10.0))
    assert coordinator.handle(Done("b", 4, 1001.0)) == [Work("b", 6, (18,))]  # at 125 s
    assert coordinator.handle(Joined("c", 1002.0)) == [Work("c", 7, (19,))]


def test_a_unit_that_kills_its_workers_ends_the_pass_by_name_and_no_other_is_blamed():
    """Unit 140 is lost with a lease of 64, with a piece of 8 less the unit that a new worker begins with, and four times alone."""
    coordinator, deaths, now = fresh(1000, commit_interval_s=64.0, max_failures=3), 0, 0.0
    decisions = coordinator.handle(Joined("w0", now))
    while isinstance(decisions[-1], Work):
        work, now = decisions[-1], now + len(decisions[-1].units)
        if 140 in work.units:
            deaths += 1
            decisions = coordinator.handle(Lost(work.worker, "out of memory", now))
            if decisions == [Spawn("out of memory")]:
                now += 1000
                decisions = coordinator.handle(Joined(f"w{deaths}", now))
        else:
            decisions = coordinator.handle(Done(work.worker, work.lease, now))
    assert decisions == [Abort("unit 140 failed 4 times, last: out of memory")]
    assert deaths == 6


def test_a_unit_alone_waits_longer_each_time_while_others_go_on():
    coordinator = fresh(2, max_failures=3)
    coordinator.handle(Joined("a", 0.0))
    coordinator.handle(Lost("a", "503", 1.0))
    assert coordinator.handle(Joined("b", 1.5)) == [Work("b", 2, (1,))]
    assert coordinator.handle(Joined("c", 1.6)) == []
    assert coordinator.handle(Tick(2.0)) == [Work("c", 3, (0,))]
    coordinator.handle(Lost("c", "503", 3.0))
    coordinator.handle(Joined("d", 4.0))
    assert coordinator.handle(Tick(6.9)) == []
    assert coordinator.handle(Tick(7.0)) == [Work("d", 4, (0,))]


def test_workers_that_die_before_any_work_end_the_pass():
    coordinator = fresh(2, max_failures=2)
    for i in range(2):
        assert coordinator.handle(Lost(f"w{i}", "no module named x", 0.0)) == [Spawn("no module named x")]
    assert coordinator.handle(Lost("w3", "no module named x", 0.0)) == [
        Abort("3 failures without one commit, last: no module named x")
    ]


def test_a_node_that_takes_all_its_workers_with_it_does_not_end_the_pass():
    coordinator = fresh(100)
    for i in range(4):
        coordinator.handle(Joined(f"w{i}", 0.0))
    for i in range(4):
        assert coordinator.handle(Lost(f"w{i}", "node died", 1.0)) == [Spawn("node died")]
    assert coordinator.handle(Joined("w4", 60.0)) == [Work("w4", 5, (0,))]


def test_a_node_that_fails_before_any_worker_is_ready_does_not_end_a_large_pass():
    coordinator = fresh(100, max_failures=3, num_workers=64)
    for i in range(8):
        assert coordinator.handle(Lost(f"w{i}", "no CUDA", 1.0)) == [Spawn("no CUDA")]
    assert coordinator.handle(Joined("w8", 60.0)) == [Work("w8", 1, (0,))]


def test_a_message_that_comes_twice_or_too_late_changes_nothing():
    coordinator = fresh(3, commit_interval_s=1.0)
    coordinator.handle(Joined("a", 0.0))
    assert coordinator.handle(Joined("a", 0.5)) == []
    assert coordinator.handle(Done("a", 1, 1.0)) == [Work("a", 2, (1,))]
    assert coordinator.handle(Done("a", 1, 1.1)) == []
    assert coordinator.handle(Lost("a", "unreachable", 2.0)) == [Spawn("unreachable")]
    assert coordinator.handle(Lost("a", "unreachable", 2.1)) == []
    assert coordinator.handle(Done("a", 2, 3.0)) == []
    assert coordinator.handle(Joined("a", 3.1)) == []
    assert (coordinator.num_done, coordinator.num_lost) == (1, 1)


# --- the end game ------------------------------------------------------------------------------------------------------


def with_a_straggler() -> Coordinator:
    """Worker slow has units 2 to 5 since second 1 as lease 3, all others are done, and a is idle.

    A unit takes a second, so that lease 3 is overdue after twice 4 s and twice 60 s / 20: at second 15.
    """
    coordinator = fresh(18, commit_interval_s=60.0)
    coordinator.handle(Joined("slow", 0.0))
    coordinator.handle(Joined("a", 0.0))
    assert coordinator.handle(Done("slow", 1, 1.0)) == [Work("slow", 3, (2, 3, 4, 5))]
    decisions = coordinator.handle(Done("a", 2, 1.0))
    for lease, now in zip(range(4, 12), (4, 6, 8, 9, 10, 11, 12, 13), strict=True):
        assert decisions[0].lease == lease
        decisions = coordinator.handle(Done("a", lease, float(now)))
    assert (coordinator.num_done, decisions) == (14, [])
    assert coordinator.handle(Tick(15.0)) == []
    return coordinator


def test_an_overdue_lease_is_copied_from_its_end_and_its_first_piece_when_the_others_are_committed():
    coordinator = with_a_straggler()
    assert coordinator.handle(Tick(15.1)) == [Work("a", 12, (5,))]
    assert coordinator.handle(Joined("b", 15.2)) == [Work("b", 13, (4,))]
    assert coordinator.handle(Joined("c", 15.3)) == [Work("c", 14, (3,))]
    assert coordinator.handle(Joined("d", 15.4)) == []
    assert coordinator.handle(Done("b", 13, 16.0)) == []
    assert coordinator.handle(Done("a", 12, 16.1)) == []
    assert coordinator.handle(Done("c", 14, 16.3)) == [Work("b", 15, (2,))]
    assert coordinator.handle(Done("b", 15, 17.3)) == [Finish()]


def test_a_straggler_that_commits_before_its_first_piece_is_copied_has_done_the_whole_lease():
    coordinator = with_a_straggler()
    assert coordinator.handle(Tick(15.1)) == [Work("a", 12, (5,))]
    assert coordinator.handle(Done("slow", 3, 15.5)) == [Finish()]


def test_what_is_committed_is_not_copied():
    coordinator = fresh(3, commit_interval_s=1.0)
    for worker in ("slow", "slower", "a"):
        coordinator.handle(Joined(worker, 0.0))
    assert coordinator.handle(Done("a", 3, 1.0)) == []
    assert coordinator.handle(Tick(2.2)) == [Work("a", 4, (0,))]
    assert coordinator.handle(Done("slow", 1, 2.3)) == []
    assert coordinator.handle(Tick(4.0)) == [Work("slow", 5, (1,))]
    assert coordinator.handle(Joined("b", 60.0)) == [
        Work("b", 6, (1,))
    ]  # a still computes unit 0, which slow has committed


def test_the_fastest_idle_worker_copies():
    coordinator = with_a_straggler()
    assert coordinator.handle(Joined("new", 14.0)) == []
    assert coordinator.handle(Tick(15.1)) == [Work("a", 12, (5,)), Work("new", 13, (4,))]


def test_a_piece_whose_copier_dies_is_given_to_another():
    coordinator = with_a_straggler()
    assert coordinator.handle(Tick(15.1)) == [Work("a", 12, (5,))]
    assert coordinator.handle(Lost("a", "killed", 15.2)) == [Spawn("killed")]
    assert coordinator.handle(Joined("b", 15.3)) == [Work("b", 13, (4,))]  # unit 5 waits for a second
    assert coordinator.handle(Joined("c", 16.3)) == [Work("c", 14, (5,))]


def test_of_a_straggler_that_dies_only_what_nobody_copies_comes_back():
    coordinator = with_a_straggler()
    assert coordinator.handle(Tick(15.1)) == [Work("a", 12, (5,))]
    assert coordinator.handle(Lost("slow", "killed", 15.2)) == [Spawn("killed")]
    given = [coordinator.handle(Joined(worker, 16.3))[0].units for worker in "bcd"]
    assert given == [(2,), (3,), (4,)]
    assert coordinator.handle(Joined("e", 16.4)) == []


def test_workers_of_all_speeds_end_together():
    """64 workers that differ tenfold, in virtual time: at most a fiftieth longer than the same work without a gap."""
    units_per_s = {f"w{i}": speed for i, speed in enumerate(np.geomspace(0.4, 4, 64).tolist())}
    coordinator, now = fresh(100_000), 0.0
    messages = [(0.0, i, Joined(worker, 0.0)) for i, worker in enumerate(units_per_s)]
    while not coordinator.finished:
        now, _, event = heapq.heappop(messages)
        for work in coordinator.handle(event):
            if isinstance(work, Work):
                end = now + len(work.units) / units_per_s[work.worker]
                heapq.heappush(messages, (end, work.lease, Done(work.worker, work.lease, end)))
    assert now < 1.02 * 100_000 / sum(units_per_s.values())


# --- stories -----------------------------------------------------------------------------------------------------------


def test_a_first_unit_that_hangs_is_given_to_another_worker():
    coordinator = fresh(1, commit_interval_s=10.0)
    coordinator.handle(Joined("hangs", 0.0))
    assert coordinator.handle(Joined("b", 1.0)) == []
    assert coordinator.handle(Tick(15.0)) == []
    assert coordinator.handle(Tick(22.0)) == [Work("b", 2, (0,))]


def test_a_worker_that_nobody_should_replace_leaves_its_units():
    coordinator = fresh(2)
    coordinator.handle(Joined("foreign", 0.0))
    assert coordinator.handle(Lost("foreign", "another GPU", 1.0, replace=False)) == []
    assert coordinator.handle(Joined("b", 1.0)) == [Work("b", 2, (1,))]


@pytest.mark.parametrize("block", range(8))
def test_250_stories_of_misfortune_count_each_row_once(block):
    happened: Counter[str] = Counter()
    for seed in range(250 * block, 250 * (block + 1)):
        happened += simulation.run(seed)
    assert {*simulation.Cluster.FATES, "message twice", "joins late", "node dies", "driver dies", "left out"} <= {
        *happened
    }
