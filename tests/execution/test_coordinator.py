"""The coordinator's decisions, event by event."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.execution.coordinator import Abort, Coordinator, Done, Finish, Joined, Lost, Spawn, Tick, Work
from tests import simulation


def fresh(num_units: int, **options) -> Coordinator:
    return Coordinator(np.zeros(num_units, dtype=bool), **options)


def test_the_first_lease_is_one_unit_and_the_next_fits_the_commit_interval():
    coordinator = fresh(100, commit_interval_s=10.0)
    assert coordinator.handle(Joined("a", 0.0)) == [Work("a", 1, (0,))]
    assert coordinator.handle(Done("a", 1, 2.0)) == [Work("a", 2, (1, 2, 3, 4, 5))]


def test_leases_shrink_towards_the_end_so_that_workers_end_together():
    coordinator = fresh(9, commit_interval_s=100.0)
    coordinator.handle(Joined("a", 0.0))
    coordinator.handle(Joined("b", 0.0))
    assert coordinator.handle(Done("a", 1, 1.0)) == [Work("a", 3, (2, 3))]  # 7 left, 2 workers: ceil(7 / 4)


def test_a_lost_lease_goes_back_unit_by_unit_and_a_worker_is_replaced():
    coordinator = fresh(10, commit_interval_s=2.0)
    coordinator.handle(Joined("a", 0.0))
    assert coordinator.handle(Done("a", 1, 1.0)) == [Work("a", 2, (1, 2))]
    assert coordinator.handle(Lost("a", "killed", 2.0)) == [Spawn("killed")]
    assert coordinator.handle(Joined("b", 3.0)) == [Work("b", 3, (1,))]  # the pause of one second is over
    assert coordinator.handle(Done("b", 3, 4.0)) == [Work("b", 4, (2,))]
    assert coordinator.num_lost == 1


def test_a_unit_that_kills_its_workers_ends_the_pass_by_name():
    coordinator = fresh(2, max_failures=1)
    coordinator.handle(Joined("a", 0.0))
    coordinator.handle(Lost("a", "out of memory", 1.0))
    coordinator.handle(Joined("b", 2.0))
    assert coordinator.handle(Lost("b", "out of memory", 3.0)) == [Abort("unit 0 failed 2 times, last: out of memory")]


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


def test_a_unit_that_failed_waits_longer_each_time_while_others_go_on():
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


def test_a_copied_lease_is_copied_again_when_the_copys_worker_dies():
    coordinator = fresh(3, commit_interval_s=1.0)
    coordinator.handle(Joined("a", 0.0))
    coordinator.handle(Joined("hangs", 0.0))
    coordinator.handle(Done("a", 1, 1.0))
    coordinator.handle(Done("a", 3, 2.0))
    assert coordinator.handle(Tick(6.5)) == [Work("a", 4, (1,))]
    coordinator.handle(Lost("a", "killed", 7.0))
    assert coordinator.handle(Joined("b", 20.0)) == [Work("b", 5, (1,))]


def test_committed_units_are_not_done_again():
    coordinator = Coordinator(np.array([True, False, True]))
    assert coordinator.num_done == 2
    assert coordinator.handle(Joined("a", 0.0)) == [Work("a", 1, (1,))]
    assert coordinator.handle(Done("a", 1, 1.0)) == [Finish()]
    assert coordinator.handle(Joined("b", 1.0)) == []


def test_a_stragglers_lease_is_given_to_an_idle_worker_once():
    coordinator = fresh(3, commit_interval_s=1.0)
    coordinator.handle(Joined("a", 0.0))
    coordinator.handle(Joined("slow", 0.0))
    assert coordinator.handle(Done("a", 1, 1.0)) == [Work("a", 3, (2,))]
    assert coordinator.handle(Done("a", 3, 2.0)) == []
    assert coordinator.handle(Tick(3.0)) == []
    assert coordinator.handle(Tick(6.5)) == [Work("a", 4, (1,))]
    assert coordinator.handle(Done("a", 4, 7.0)) == [Finish()]


def test_a_message_that_comes_twice_or_too_late_changes_nothing():
    coordinator = fresh(3, commit_interval_s=1.0)
    coordinator.handle(Joined("a", 0.0))
    assert coordinator.handle(Done("a", 1, 1.0)) == [Work("a", 2, (1,))]
    assert coordinator.handle(Done("a", 1, 1.1)) == []
    coordinator.handle(Lost("a", "unreachable", 2.0))
    assert coordinator.handle(Done("a", 2, 3.0)) == []
    assert coordinator.num_done == 1


@pytest.mark.parametrize("block", range(8))
def test_250_stories_of_misfortune_count_each_unit_once(block):
    for seed in range(250 * block, 250 * (block + 1)):
        assert simulation.run(seed).missing == []
