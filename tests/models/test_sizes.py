"""Sizes that code states: which expression says how many channels there are, and which cannot be told."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.graph import Size
from pipeline.models.trace import propagate


class Net(nn.Module):
    """Eight channels between two layers; what lies between is for the subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc0, self.fc1 = nn.Linear(3, 8), nn.Linear(8, 2)
        self.width, self.half, self.heads, self.parts = 8, 4, 2, [3, 5]

    def between(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(self.between(self.fc0(x)))


def sizes(model: nn.Module, num_rows: int = 3) -> list[Size]:
    return list(propagate(model, torch.ones(num_rows, 3)).sizes)


def texts(model: nn.Module) -> list[str]:
    return [size.text for size in sizes(model)]


# --- one test for each function that states sizes ---------------------------------------------------------------------


class Reshape(Net):
    def between(self, h: Tensor) -> Tensor:
        return h.reshape(len(h), 2 * 4)


class Reshaped(Net):
    def between(self, h: Tensor) -> Tensor:
        return torch.reshape(h, (-1, 3 + 5))


class View(Net):
    def between(self, h: Tensor) -> Tensor:
        return h.view(-1, self.width)


class Splitting(Net):
    def between(self, h: Tensor) -> Tensor:
        return h.view(-1, self.heads, self.width // self.heads).flatten(1)


class Expand(Net):
    def between(self, h: Tensor) -> Tensor:
        return (h[:, :, None].expand(-1, 8, 5) * 1).mean(-1)


class Unflatten(Net):
    def between(self, h: Tensor) -> Tensor:
        return h.unflatten(1, (2, self.half)).flatten(1)


class Split(Net):
    def between(self, h: Tensor) -> Tensor:
        return torch.cat(h.split([1 + 2, 5], dim=-1), -1)


class EqualSplit(Net):
    def between(self, h: Tensor) -> Tensor:
        return torch.cat(h.split(self.half, dim=-1), -1)


class Slices(Net):
    def between(self, h: Tensor) -> Tensor:
        return torch.cat([h[:, :3], h[..., 1 + 2 :]], -1)


class FromTheEnd(Net):
    def between(self, h: Tensor) -> Tensor:
        return torch.cat([h[:, :-5], h[:, -5:]], -1)


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (Reshape, ["2 * 4"]),
        (Reshaped, ["3 + 5"]),
        (View, ["self.width"]),
        (Splitting, ["self.width // self.heads"]),
        (Expand, ["8"]),
        (Unflatten, ["self.half"]),
        (Split, ["1 + 2", "5"]),
        (EqualSplit, ["self.half"]),
        (Slices, ["3", "1 + 2"]),
        (FromTheEnd, ["-5", "-5"]),
    ],
)
def test_the_expression_that_counts_channels_is_found_as_it_stands(net, expected):
    assert texts(net()) == expected


def test_a_size_says_what_it_counts():
    first, second = sizes(Slices())
    assert (first.channels, first.fixed, first.negative) == ({"fc0": (0, 1, 2)}, 0, False)
    assert second.channels == {"fc0": (0, 1, 2)}  # where the second slice begins
    negative = sizes(FromTheEnd())[0]
    assert (negative.channels, negative.negative) == ({"fc0": (3, 4, 5, 6, 7)}, True)


def test_a_place_is_counted_from_the_first_line_of_its_function():
    (size,) = sizes(Reshape())
    assert (size.module, size.functions, size.line, size.column) == ("", ("between",), 1, 33)


# --- attributes -------------------------------------------------------------------------------------------------------


class Listed(Net):
    def between(self, h: Tensor) -> Tensor:
        return torch.cat(h.split(self.parts, dim=-1), -1)


def test_a_list_that_is_an_attribute_is_found_by_its_elements():
    assert [(s.attribute, s.element, s.channels) for s in sizes(Listed())] == [
        ("parts", 0, {"fc0": (0, 1, 2)}),
        ("parts", 1, {"fc0": (3, 4, 5, 6, 7)}),
    ]


class Factor(Net):
    def between(self, h: Tensor) -> Tensor:
        return h.T.reshape(1 * self.width, len(h)).T


def test_an_attribute_that_is_a_factor_of_the_expression_holds_the_number():
    assert [(s.attribute, s.text) for s in sizes(Factor())] == [("width", "1 * self.width")]


class TwoMeanings(Net):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(8, 8)

    def between(self, h: Tensor) -> Tensor:
        h = self.middle(h.reshape(-1, self.width))
        return h.reshape(-1, self.width)


def test_an_attribute_with_two_meanings_stays_and_each_place_states_its_own_number():
    assert [(s.attribute, s.line, list(s.channels)) for s in sizes(TwoMeanings())] == [
        ("", 1, ["fc0"]),
        ("", 2, ["middle"]),
    ]


class OneMeaning(Net):
    def between(self, h: Tensor) -> Tensor:
        return h.reshape(-1, self.width).relu().reshape(-1, self.width)


def test_an_attribute_that_is_read_twice_is_one_size():
    assert [s.attribute for s in sizes(OneMeaning())] == ["width"]


class Loop(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def between(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h.reshape(-1, 8))
        return h


def test_one_place_that_counts_several_groups_cannot_follow():
    assert sizes(Loop()) == []


# --- where the call stands --------------------------------------------------------------------------------------------


class SeveralLines(Net):
    def between(self, h: Tensor) -> Tensor:
        return (
            h.relu()
            .reshape(
                len(h),
                8,
            )
            .reshape(len(h), 4 + 4)
        )


def test_calls_over_several_lines_are_told_apart():
    assert [(s.text, s.line) for s in sizes(SeveralLines())] == [("8", 5), ("4 + 4", 7)]


def merged(h: Tensor, num_rows: int) -> Tensor:
    return h.reshape(num_rows, 8)


def through(h: Tensor) -> Tensor:
    return merged(h, len(h))


class Helper(Net):
    def between(self, h: Tensor) -> Tensor:
        return through(h)


def test_helpers_are_followed_from_the_method_that_calls_them():
    (size,) = sizes(Helper())
    assert (size.functions, size.line, size.text) == (("between", "through", "merged"), 1, "8")


SIX = 6


def times(_number: int) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    return lambda function: function


groups = 4


@times(groups)
def grouped(h: Tensor, groups: int = groups, *, also: int = groups // 2) -> Tensor:
    assert h.shape[1] % groups == 0
    assert groups is not None
    assert all(groups > part for part in range(2))
    return h.reshape(len(h), groups, h.shape[1] // groups).flatten(1) * also


class Argument(Net):
    def between(self, h: Tensor) -> Tensor:
        return grouped(h, groups=4)


def test_an_argument_that_keeps_its_value_is_found_wherever_the_body_reads_it():
    """Not in the decorator or among the defaults, where the name is another one; not where it is asked whether it is one."""
    found = sorted((s.line, s.column, s.text) for s in sizes(Argument()))
    assert found == [
        (2, 24, "groups"),
        (4, 15, "groups"),
        (5, 29, "groups"),
        (5, 37, "h.shape[1] // groups"),
        (5, 51, "groups"),
    ]


def rebound(h: Tensor, n: int) -> Tensor:
    n = n + 0
    return h.reshape(len(h), n) * (n / n)


def increased(h: Tensor, n: int) -> Tensor:
    h = h.reshape(len(h), n) * (n / n)
    n += 1
    return h


def deleted(h: Tensor, n: int) -> Tensor:
    h = h.reshape(len(h), n) * (n / n)
    del n
    return h


def for_another(h: Tensor, n: int) -> Tensor:
    return h.reshape(len(h), n) * (n / n) * sum(n for n in range(2))


def of_a_lambda(h: Tensor, n: int) -> Tensor:
    return h.reshape(len(h), n) * (n / n) * (lambda n: n + 1)(0)


def of_a_function(h: Tensor, n: int) -> Tensor:
    def inner(n: int) -> int:
        return n + 1

    return h.reshape(len(h), n) * (n / n) * inner(0)


def of_the_file(h: Tensor, SIX: int) -> Tensor:
    def outer() -> int:
        global SIX
        return SIX

    return h.reshape(len(h), SIX) * (SIX / SIX) * outer()


def of_an_error(h: Tensor, n: int) -> Tensor:
    try:
        return h.reshape(len(h), n) * (n / n)
    except ValueError as n:
        raise n


@pytest.mark.parametrize(
    "function", [rebound, increased, deleted, for_another, of_a_lambda, of_a_function, of_the_file, of_an_error]
)
def test_an_argument_whose_name_means_something_else_as_well_is_found_where_it_is_given_alone(function):
    class Own(Net):
        def between(self, h: Tensor) -> Tensor:
            return function(h, 8)

    (size,) = sizes(Own())
    assert inspect.getsource(function).splitlines()[size.line][: size.column].endswith("reshape(len(h), ")


class TwoArguments(Net):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(8, 8)

    def between(self, h: Tensor) -> Tensor:
        return self.twice(h, 8)

    def twice(self, h: Tensor, n: int) -> Tensor:
        assert n % 2 == 0
        h = self.middle(h.reshape(-1, n))
        return h.reshape(-1, n)


def test_an_argument_that_counts_two_kinds_of_channels_states_each_where_it_is_given():
    """What it stands for where it is only read (line 1) cannot be told."""
    assert [(s.text, s.line, list(s.channels)) for s in sizes(TwoArguments())] == [
        ("n", 2, ["fc0"]),
        ("n", 3, ["middle"]),
    ]


class OwnMethod(Net):
    def between(self, h: Tensor) -> Tensor:
        return self.inner(h)

    def inner(self, h: Tensor) -> Tensor:
        return h.reshape(len(h), 8)


def test_a_method_that_another_one_calls_is_named_alone():
    assert [s.functions for s in sizes(OwnMethod())] == [("inner",)]


class Lambda(Net):
    def between(self, h: Tensor) -> Tensor:
        return (lambda y: y.reshape(len(y), 8))(h)


class Local(Net):
    def between(self, h: Tensor) -> Tensor:
        def local(y: Tensor) -> Tensor:
            return y.reshape(len(y), 8)

        return local(h)


class Starred(Net):
    def between(self, h: Tensor) -> Tensor:
        return h.reshape(*h.shape)


class Keyword(Net):
    def between(self, h: Tensor) -> Tensor:
        return torch.reshape(h, shape=(len(h), 8))


@pytest.mark.parametrize("net", [Lambda, Local, Starred, Keyword])
def test_no_expression_is_guessed_where_none_can_be_told(net):
    assert sizes(net()) == []


class KeywordSplit(Net):
    def between(self, h: Tensor) -> Tensor:
        return torch.cat(torch.split(h, split_size_or_sections=[3, 5], dim=-1), -1)


class LambdaSlice(Net):
    def between(self, h: Tensor) -> Tensor:
        return torch.cat([(lambda y: y[:, :3])(h), (lambda y: y[:, 3:])(h)], -1)


@pytest.mark.parametrize("net", [KeywordSplit, LambdaSlice])
def test_channels_that_such_a_place_takes_by_position_stay(net):
    graph = propagate(net(), torch.ones(3, 3))
    assert graph.groups == ()
    assert any("taken by their position" in frozen.reason for frozen in graph.frozen)
