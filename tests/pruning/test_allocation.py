"""Allocation: the budget is met, as closely as chunks allow, and the least saliency per cost goes."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.models.costs import count
from pipeline.models.graph import Contraction, Graph, Group, Member
from pipeline.pruning.allocation import FINE_STEP_ABOVE, SCOPES, plan
from pipeline.pruning.plan import Budget, Plan
from tests.graphs import chain, index, residual_graph

# --- what must hold for every graph, saliency and scope


@st.composite
def cases(
    draw: st.DrawFn, percent: tuple[int, int] = (5, 95)
) -> tuple[Graph, dict[str, Tensor], Budget, dict[str, object]]:
    graph = chain(*draw(st.lists(st.integers(1, 90), min_size=3, max_size=6)))
    values = torch.tensor(draw(st.lists(st.sampled_from([0.0, 1e-9, 0.5, 1.0, 3.0, -0.25]), min_size=1, max_size=6)))
    seed = draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    saliency = {g.name: values[torch.randint(len(values), (g.size,), generator=generator)] for g in graph.groups}
    budget = Budget(**{draw(st.sampled_from(["params", "macs"])): draw(st.integers(*percent)) / 100})
    options = {
        "scope": draw(st.sampled_from(sorted(SCOPES))),
        "min_keep": draw(st.sampled_from([0.0, 0.1, 0.3])),
        "round_to": draw(st.sampled_from([1, 4, 8])),
    }
    return graph, saliency, budget, options


def unit(size: int, round_to: int) -> int:
    return round_to if size > 32 else 1


def cost(graph: Graph, num_kept: dict[str, int], budget: Budget) -> int:
    return count(graph, {name: torch.arange(num) for name, num in num_kept.items()})[budget.measure]


@given(cases())
def test_the_budget_is_met_and_no_removed_chunk_fits_in_between(case):
    graph, saliency, budget, options = case
    try:
        made = plan(graph, saliency, budget, **options)
    except ValueError as error:
        assume("smallest reachable fraction" not in str(error))
        raise
    target = math.floor(Fraction(repr(budget.fraction)) * made.dense[budget.measure])
    num_kept = {group.name: len(group.kept) for group in made.groups}
    assert made.kept[budget.measure] == cost(graph, num_kept, budget) <= target
    coarse = target - made.kept[budget.measure] > FINE_STEP_ABOVE * target
    for group in made.groups:
        step, kept = unit(group.size, options["round_to"]), len(group.kept)
        assert kept >= min(group.size, max(1, math.ceil(options["min_keep"] * group.size - 1e-9)))
        if kept < group.size:
            more = min(group.size, kept + (1 if coarse else step - kept % step))
            assert cost(graph, num_kept | {group.name: more}, budget) > target


@given(cases())
def test_widths_are_multiples_unless_they_would_miss_the_target(case):
    graph, saliency, budget, options = case
    try:
        made = plan(graph, saliency, budget, **options)
    except ValueError as error:
        assume("smallest reachable fraction" not in str(error))
        raise
    rounded = {}
    for group in made.groups:
        step, kept = unit(group.size, options["round_to"]), len(group.kept)
        rounded[group.name] = kept if kept == group.size else kept - kept % step
    if rounded != {group.name: len(group.kept) for group in made.groups}:
        target = math.floor(Fraction(repr(budget.fraction)) * made.dense[budget.measure])
        assert target - cost(graph, rounded, budget) > FINE_STEP_ABOVE * target


@given(cases())
def test_each_group_keeps_its_best_channels_and_of_equals_the_first(case):
    graph, saliency, budget, options = case
    try:
        made = plan(graph, saliency, budget, **options)
    except ValueError as error:
        assume("smallest reachable fraction" not in str(error))
        raise
    for group in made.groups:
        best = sorted(range(group.size), key=lambda c: (-float(saliency[group.name][c]), c))
        assert list(group.kept) == sorted(best[: len(group.kept)])


@given(cases(percent=(1, 6)))
def test_a_budget_out_of_reach_names_the_smallest_fraction_which_is_reached(case):
    graph, saliency, budget, options = case
    options["min_keep"] = 0.3
    with pytest.raises(ValueError, match="smallest reachable fraction") as caught:
        plan(graph, saliency, budget, **options)
    message = str(caught.value)
    assert f"budget {budget.measure}={budget.fraction}" in message
    reachable = float(message.split("smallest reachable fraction is ")[1].split(". ")[0])
    assert reachable > budget.fraction
    assume(reachable < 1)
    plan(graph, saliency, Budget(**{budget.measure: reachable}), **options)


# --- the global scope


@given(
    widths=st.lists(st.integers(1, 12), min_size=3, max_size=5),
    seed=st.integers(0, 999),
    percent=st.integers(20, 90),
)
def test_global_greedy_equals_one_that_counts_everything_anew(widths, seed, percent):
    """The lazy heap against the plain form: in each step the cheapest channel of all, by counting the whole network."""
    graph, generator = chain(*widths), torch.Generator().manual_seed(seed)
    saliency = {g.name: torch.randint(0, 50, (g.size,), generator=generator).double() for g in graph.groups}
    budget = Budget(params=percent / 100)
    dense = count(graph, {}).params
    target = math.floor(Fraction(percent, 100) * dense)
    num_kept = {group.name: group.size for group in graph.groups}
    assume(cost(graph, dict.fromkeys(num_kept, 1), budget) <= target)
    now = dense
    while now > target:
        options = []
        for name, kept in num_kept.items():
            if kept > 1:
                saving = now - cost(graph, num_kept | {name: kept - 1}, budget)
                lost = float(saliency[name].sort(descending=True).values[kept - 1])
                options.append((lost / saving, name))
        name = min(options)[1]
        num_kept[name] -= 1
        now = cost(graph, num_kept, budget)
    made = plan(graph, saliency, budget, min_keep=0.0)
    assert all(len(group.kept) >= num_kept[group.name] for group in made.groups)  # some may have been given back
    if cost(graph, num_kept, budget) == target:
        assert {group.name: len(group.kept) for group in made.groups} == num_kept


def two_groups(widths: tuple[int, int]) -> Graph:
    """Two groups of two channels that share nothing; a channel of p owns widths[0] parameters, one of q widths[1]."""
    groups = tuple(Group(name, 2, (Member(name, 0, index(2), "out"),), ()) for name in "pq")
    shapes = {"p": (2, widths[0]), "q": (2, widths[1])}
    return Graph(groups, (), (Contraction("p", 1), Contraction("q", 5)), shapes, ("p", "q"), (1, 1))


def kept(made: Plan) -> dict[str, tuple[int, ...]]:
    return {group.name: group.kept for group in made.groups}


def test_global_removes_what_costs_most_per_saliency():
    # A channel of p saves 6 parameters for 3 of saliency, one of q saves 2 for 2: p goes first.
    saliency = {"p": torch.tensor([3.0, 9.0]), "q": torch.tensor([2.0, 9.0])}
    made = plan(two_groups((6, 2)), saliency, Budget(params=10 / 16))
    assert kept(made) == {"p": (1,), "q": (0, 1)}
    # In MACs a channel of q costs 10: now q goes first, and is enough.
    made = plan(two_groups((6, 2)), saliency, Budget(macs=22 / 32))
    assert kept(made) == {"p": (0, 1), "q": (1,)}


def test_what_the_last_step_took_too_much_is_given_back():
    # 16 parameters, 9 may stay. q (1 per parameter) and then p (1.5 per parameter) go: 8 remain; nothing fits into 1.
    saliency = {"p": torch.tensor([9.0, 30.0]), "q": torch.tensor([2.0, 30.0])}
    assert kept(plan(two_groups((6, 2)), saliency, Budget(params=9 / 16))) == {"p": (1,), "q": (1,)}
    # 10 may stay: p alone is enough, q comes back.
    assert kept(plan(two_groups((6, 2)), saliency, Budget(params=10 / 16))) == {"p": (1,), "q": (0, 1)}


def test_infinite_saliency_keeps_a_channel():
    saliency = {"p": torch.tensor([torch.inf, torch.inf]), "q": torch.tensor([5.0, torch.inf])}
    assert kept(plan(two_groups((6, 2)), saliency, Budget(params=14 / 16))) == {"p": (0, 1), "q": (1,)}
    with pytest.raises(ValueError, match=r"at least 14 remain: the smallest reachable fraction is 0\.8750"):
        plan(two_groups((6, 2)), saliency, Budget(params=0.5))


def test_channels_below_zero_go_first():
    saliency = {"p": torch.tensor([1e-9, 9.0]), "q": torch.tensor([-1e-9, 9.0])}
    assert kept(plan(two_groups((6, 6)), saliency, Budget(params=0.75)))["q"] == (1,)
    # The loss of either helps: of p by 1 and 6 parameters, of q by 2 and 2 parameters. 1 * 6 is more than 2 * 2.
    saliency = {"p": torch.tensor([-1.0, 9.0]), "q": torch.tensor([-2.0, 9.0])}
    assert kept(plan(two_groups((6, 2)), saliency, Budget(params=14 / 16))) == {"p": (1,), "q": (0, 1)}


# --- the other scopes


def test_layer_keeps_the_same_fraction_of_every_group():
    # Saliency differs a thousandfold between the groups, which must not matter.
    graph = chain(4, 32, 16, 8, 4)
    saliency = {group.name: torch.rand(group.size) * 1000**i for i, group in enumerate(graph.groups)}
    made = plan(graph, saliency, Budget(params=0.3), scope="layer")
    fractions = [len(group.kept) / group.size for group in made.groups]
    assert max(fractions) - min(fractions) <= 1 / 8 + 1e-9


def test_flat_ranks_channels_by_saliency_alone():
    # fc0 is three times as dear as fc1 and scores a little higher: by price it would go first, by saliency fc1 does.
    graph = chain(40, 8, 8, 4)
    saliency = {"fc0": torch.full((8,), 1.1), "fc1": torch.ones(8)}
    budget = Budget(params=0.9)
    assert len(kept(plan(graph, saliency, budget, scope="flat"))["fc0"]) == 8
    assert len(kept(plan(graph, saliency, budget, scope="global"))["fc0"]) < 8


def test_isomorphic_ranks_groups_of_one_structure_together():
    # Inside: 8 -> 8 -> 8 twice, the same structure; the first has all the saliency. The stem (2 -> 8) is another one.
    graph = chain(2, 8, 8, 8, 8, 2)
    saliency = {"fc0": torch.ones(8), "fc1": torch.full((8,), 5.0), "fc2": torch.ones(8), "fc3": torch.ones(8)}
    num_kept = {
        name: len(channels)
        for name, channels in kept(plan(graph, saliency, Budget(macs=0.5), scope="isomorphic")).items()
    }
    assert num_kept["fc1"] == 8
    assert num_kept["fc2"] < 5
    assert abs((num_kept["fc1"] + num_kept["fc2"]) / 16 - num_kept["fc0"] / 8) <= 1 / 8


def test_structures_that_differ_in_scale_only_are_one():
    # 4 -> 8 -> 16 and 16 -> 32 -> 64 read one half of C and feed twice C.
    graph = chain(4, 8, 16, 32, 64)
    saliency = {"fc0": torch.ones(8), "fc1": torch.ones(16) * 2, "fc2": torch.ones(32) * 3}
    made = plan(graph, saliency, Budget(macs=0.85), scope="isomorphic", min_keep=0.0)
    assert len(kept(made)["fc0"]) <= 3  # all of the least salient goes before any of the next
    assert len(kept(made)["fc2"]) == 32


# --- what is refused


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_saliency_that_is_no_number_names_the_group(value):
    graph = chain(3, 4, 2)
    with pytest.raises(ValueError, match=r"group fc0 is (nan|-inf) at channel 2"):
        plan(graph, {"fc0": torch.tensor([1.0, 2.0, value, 3.0])}, Budget(params=0.5))


@pytest.mark.parametrize(
    ("saliency", "message"),
    [
        ({}, "saliency lacks group fc0"),
        ({"fc0": torch.ones(5)}, r"group fc0 has shape \[5\], the group has 4"),
        ({"fc0": torch.ones(4), "fc9": torch.ones(1)}, "graph lacks: fc9"),
    ],
)
def test_saliency_must_fit_the_graph(saliency, message):
    with pytest.raises(ValueError, match=message):
        plan(chain(3, 4, 2), saliency, Budget(params=0.5))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"scope": "universe"}, "'universe' is unknown; known scopes: global, flat, layer, isomorphic"),
        ({"min_keep": 1.0}, r"min_keep \(1\.0\)"),
        ({"round_to": 0}, r"round_to \(0\)"),
    ],
)
def test_wrong_options_name_their_value(option, message):
    with pytest.raises(ValueError, match=message):
        plan(chain(3, 4, 2), {"fc0": torch.ones(4)}, Budget(params=0.5), **option)


def test_a_network_without_groups_cannot_meet_a_budget():
    graph = Graph((), (), (), {"w": (3,)}, ("w",), (1, 3))
    with pytest.raises(ValueError, match=r"fraction is 1\.0000\. Lower min_keep"):
        plan(graph, {}, Budget(params=0.5))


def test_the_plan_records_how_it_came_about():
    saliency = {"conv": torch.arange(8.0), "a": torch.arange(12.0)}
    made = plan(residual_graph(), saliency, Budget(macs=0.5), criterion="taylor", scope="layer")
    assert (made.criterion, made.scope, made.budget) == ("taylor", "layer", {"macs": 0.5})
    assert made.graph_sha256 == residual_graph().sha256()


def vector(size: int) -> Graph:
    """One group whose channels own one parameter each."""
    return Graph((Group("p", size, (Member("p", 0, index(size), "out"),), ()),), (), (), {"p": (size,)}, ("p",), (1, 1))


def num_kept_of_vector(size: int, fraction: float) -> int:
    return len(plan(vector(size), {"p": torch.ones(size)}, Budget(params=fraction)).groups[0].kept)


def test_a_fraction_means_its_decimal_digits():
    # 0.3 as a float is a little less than 3/10; of 10 parameters 3 may stay, not 2.
    assert num_kept_of_vector(10, 0.3) == 3


def test_round_widths_are_left_only_if_they_miss_the_target_by_more_than_half_a_percent():
    assert num_kept_of_vector(8000, 4003 / 8000) == 4000
    assert num_kept_of_vector(80, 43 / 80) == 43


def test_a_floor_is_rounded_up_to_a_multiple():
    # A tenth of 100 is 10, the next multiple of 8 is 16.
    with pytest.raises(ValueError, match=r"at least 16 remain"):
        num_kept_of_vector(100, 0.12)
    assert num_kept_of_vector(100, 0.16) == 16


def test_after_an_earlier_cut_target_floors_and_steps_are_those_of_the_dense_network():
    def beside(size: int) -> Graph:
        """`vector` beside 10,000 parameters that stay: a channel is too little to leave the multiples for."""
        return replace(vector(size), shapes={"p": (size,), "rest": (10_000,)}, parameters=("p", "rest"))

    dense, left, saliency = beside(40), beside(24), {"p": torch.arange(24.0)}
    made = plan(left, saliency, Budget(params=10_018.5 / 10_040), dense=dense)
    assert (made.dense.params, made.kept.params) == (10_040, 10_016)  # a group of 40 goes by 8, also when 24 are left
    assert made.groups[0].kept == tuple(range(8, 24))
    assert plan(left, saliency, Budget(params=10_018.5 / 10_024)).kept.params == 10_018
    with pytest.raises(ValueError, match=r"10,018 of 10,040 params, but at least 10,024 remain"):
        plan(left, saliency, Budget(params=10_018.5 / 10_040), min_keep=0.5, dense=dense)  # 20 of 40, rounded up
