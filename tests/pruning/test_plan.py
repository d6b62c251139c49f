"""The plan: plain data that says exactly what is kept, survives its text and refuses what is broken."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.costs import Costs
from pipeline.models.graph import Contraction, Graph, Group, Member, Size
from pipeline.pruning.plan import Budget, Plan, PlannedGroup, parse_ranges, planned, ranges
from tests.graphs import chain, index, residual_graph


def small_plan() -> Plan:
    return planned(chain(3, 4, 2), {"fc0": [3, 0]}, budget=Budget(params=0.6), criterion="taylor", scope="global")


# --- budget


@pytest.mark.parametrize("value", [0, 1, 1.5, -0.5, float("nan"), True, "0.5"])
@pytest.mark.parametrize("name", ["params", "macs"])
def test_a_budget_outside_zero_and_one_names_field_value_and_way_out(name, value):
    with pytest.raises(ValueError, match=rf"Budget\.{name} \({re.escape(repr(value))}\).*Budget\({name}=0\.5\)"):
        Budget(**{name: value})


def test_a_budget_of_both_or_none_is_refused():
    with pytest.raises(ValueError, match=r"params=0\.5, macs=0\.5.*Budget\(params=0\.5\)"):
        Budget(params=0.5, macs=0.5)
    with pytest.raises(ValueError, match="params=None, macs=None"):
        Budget()


def test_a_budget_knows_its_measure():
    assert (Budget(macs=0.25).measure, Budget(macs=0.25).fraction) == ("macs", 0.25)
    assert Budget(params=0.5).as_dict() == {"params": 0.5}


# --- slices


def test_planned_sorts_what_is_kept_and_counts_it():
    plan = small_plan()
    assert plan.groups[0].kept == (0, 3)
    assert plan.groups[0].removed == (1, 2)
    # fc0: 3*2 + 2, fc1: 2*2 + 2
    assert (plan.dense, plan.kept) == (Costs(26, 20), Costs(14, 10))


def test_slices_name_the_kept_entries_of_every_member():
    slices = small_plan().slices()
    as_lists = {tensor: {dim: kept.tolist() for dim, kept in dims.items()} for tensor, dims in slices.items()}
    assert as_lists == {"fc0.weight": {0: [0, 3]}, "fc0.bias": {0: [0, 3]}, "fc1.weight": {1: [0, 3]}}


def test_slices_of_a_flattened_head_take_all_positions_of_a_channel():
    slices = planned(residual_graph(), {"conv": [1, 7]}).slices()
    assert slices["fc.weight"][1].tolist() == [4, 5, 6, 7, 28, 29, 30, 31]
    assert slices["a.weight"].keys() == {1}  # the inside of the block stays whole


def test_slices_of_a_concatenation_keep_the_entries_that_nobody_owns():
    # Columns 0-1 belong to p, 2-3 to nobody (frozen), 4-6 to q.
    p = Group("p", 2, (Member("w", 1, index(2), "in"),), ())
    q = Group("q", 3, (Member("w", 1, index(3, start=4), "in"),), ())
    graph = Graph((p, q), (), (Contraction("w", 1),), {"w": (2, 7)}, ("w",), (1, 7))
    plan = planned(graph, {"p": [1], "q": [0, 2]})
    assert plan.slices()["w"][1].tolist() == [1, 2, 3, 4, 6]
    assert plan.kept == Costs(params=10, macs=10)


def test_a_plan_that_removes_nothing_has_no_slices():
    assert planned(chain(3, 4, 2), {}).slices() == {}


# --- validity


@pytest.mark.parametrize(
    ("kept", "message"),
    [((1, 0), "must ascend"), ((2, 2), "must ascend"), ((4,), "at most 3")],
)
def test_a_group_keeps_its_channels_in_order(kept, message):
    with pytest.raises(ValueError, match=f"group g.*{message}"):
        PlannedGroup("g", 4, kept, ())


def test_two_groups_cannot_own_the_same_entries():
    groups = tuple(PlannedGroup(name, 2, (0,), (Member("w", 0, index(2), "out"),)) for name in "pq")
    with pytest.raises(ValueError, match="group q: w dimension 0 has entries of group p"):
        Plan(groups, "", {}, "", "", Costs(1, 1), Costs(1, 1), {"w": (2,)})


def test_members_must_fit_the_shapes():
    group = PlannedGroup("g", 2, (0,), (Member("w", 0, index(2), "out"),))
    for shapes, message in (({}, "not in plan.shapes"), ({"w": (1,)}, "1 entries in dimension 0"), ({"w": ()}, "dim")):
        with pytest.raises(ValueError, match=message):
            Plan((group,), "", {}, "", "", Costs(1, 1), Costs(1, 1), shapes)


# --- text


@given(stream=st.sets(st.integers(0, 7), min_size=1), inside=st.sets(st.integers(0, 11), min_size=1))
def test_a_plan_survives_its_text(stream, inside):
    plan = planned(residual_graph(), {"conv": stream, "a": inside}, budget=Budget(macs=0.5), scope="layer")
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()


def stating_plan(**changes: object) -> Plan:
    """Of a network whose code states the four channels of fc0."""
    size = Size("", "width", None, ("forward",), 2, 17, "self.width", {"fc0": (0, 1, 2, 3)}, 0)
    graph = replace(chain(3, 4, 2), sizes=(replace(size, **changes),), heads=("fc1",))
    return planned(graph, {"fc0": [3, 0]})


def test_sizes_and_heads_of_the_graph_survive_the_text_of_the_plan():
    plan = stating_plan(element=1, negative=True)
    assert Plan.from_json(plan.to_json()) == plan
    assert (plan.sizes[0].value(plan.kept_by_group()), plan.heads) == (-2, ("fc1",))


def test_sha256_is_of_what_the_code_has_to_state_too():
    others = [stating_plan(), stating_plan(attribute=""), stating_plan(line=3), stating_plan(fixed=1)]
    assert len({plan.sha256() for plan in [planned(chain(3, 4, 2), {"fc0": [3, 0]}), *others]}) == 5


def test_the_text_is_json_with_one_readable_line_per_group():
    text = small_plan().to_json()
    document = json.loads(text)
    assert document["groups"][0]["kept"] == "0,3"
    assert document["budget"] == {"params": 0.6}
    assert sum(line.startswith('{"name":') for line in text.splitlines()) == 1


def test_sha256_is_of_what_is_kept_and_not_of_how_it_came_about():
    graph = chain(3, 4, 2)
    assert planned(graph, {"fc0": [0, 3]}, criterion="random", scope="layer").sha256() == small_plan().sha256()
    assert planned(graph, {"fc0": [0, 2]}).sha256() != small_plan().sha256()
    assert planned(chain(3, 4, 5), {"fc0": [0, 3]}).sha256() != small_plan().sha256()


def test_sha256_of_a_small_plan_is_golden():
    assert small_plan().sha256() == "5aa79a96471b159839f826d8e31a1954fb78afc9e1534d04849ea2a09daca4f9"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("groups"), "plan lacks 'groups'"),
        (lambda d: d.update(format="plan/9"), "format is 'plan/9'"),
        (lambda d: d.update(criterion=3), "plan.criterion is 3, not str"),
        (lambda d: d.update(budget={"latency": 0.5}), "unknown .*latency"),
        (lambda d: d.update(budget={"params": 2}), r"Budget\.params \(2\)"),
        (lambda d: d["kept"].pop("macs"), "plan.kept lacks 'macs'"),
        (lambda d: d["dense"].update(params=-1), "plan.dense.params is -1"),
        (lambda d: d["shapes"].update({"fc0.bias": "4"}), "plan.shapes.*'4', not a list"),
        (lambda d: d["groups"].append(7), r"plan.groups\[1\] is 7"),
        (lambda d: d["groups"][0].update(kept="0-"), r"groups\[0\] \(fc0\)\.kept"),
        (lambda d: d["groups"][0].update(kept="0-9"), "below 4"),
        (lambda d: d["groups"][0].update(kept="3-1"), "ascending"),
        (lambda d: d["groups"][0].update(kept="1,0"), "must ascend"),
        (lambda d: d["groups"][0].update(kept=""), "keeps 0 of 4"),
        (lambda d: d["groups"][0].update(kept="0-2"), "they were edited"),
        (lambda d: d["groups"][0].update(size=5), "fc0"),
        (lambda d: d["groups"][0]["members"].append(["fc0.weight"]), r"members\[3\]"),
        (lambda d: d["groups"][0]["members"][0].__setitem__(2, "sideways"), "sideways"),
        (lambda d: d["groups"][0]["members"][0].__setitem__(3, {"shape": [4, 1]}), "members.*fc0.weight"),
        (lambda d: d["groups"].append(d["groups"][0]), "fc0 occurs twice"),
        (lambda d: d.pop("sizes"), "plan lacks 'sizes'"),
        (lambda d: d["sizes"].append(["", "width"]), r"plan\.sizes\[0\] is \['', 'width'\]"),
        (lambda d: d["sizes"].append(stating_plan().sizes[0].to_list()), "they were edited"),
    ],
)
def test_a_broken_plan_is_refused_with_its_place(change, message):
    document = json.loads(small_plan().to_json())
    change(document)
    with pytest.raises(ValueError, match=message):
        Plan.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "[]", "{", small_plan().to_json()[:-20]])
def test_a_text_that_was_cut_off_is_refused(text):
    with pytest.raises(ValueError, match="plan: "):
        Plan.from_json(text)


@given(st.sets(st.integers(0, 40)))
def test_ranges_read_like_page_numbers(channels):
    assert parse_ranges(ranges(sorted(channels)), 41) == tuple(sorted(channels))


def test_ranges_by_hand():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


def test_diff_tells_what_another_plan_keeps():
    graph = residual_graph()
    first, second = planned(graph, {"a": range(8)}), planned(graph, {"a": [0, 1, 2, 9]})
    assert first.diff(second) == ["a: keeps 8 -> 4 of 12; drops 3-7, adds 9"]
    assert first.diff(first) == []


def test_an_unknown_group_lists_the_known_ones():
    assert small_plan().group("fc0").size == 4
    with pytest.raises(ValueError, match=r"no group 'x'.*fc0"):
        small_plan().group("x")
    with pytest.raises(ValueError, match=r"no group 'x'.*fc0"):
        planned(chain(3, 4, 2), {"x": [0]})


def test_kept_may_be_tensors():
    assert planned(chain(3, 4, 2), {"fc0": torch.tensor([3, 0])}).groups == small_plan().groups
