"""The graph is plain data: it survives JSON, and its hash says what it holds and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.graph import Frozen, Graph, Group, Member, Site, Size, decode_index, encode_index
from tests.graphs import chain, index, residual_graph


def test_json_gives_the_graph_back():
    graph = residual_graph()
    assert Graph.from_json(graph.to_json()) == graph
    assert Graph.from_json(graph.to_json()).sha256() == graph.sha256()


def test_the_hash_is_this_one_in_every_process():
    # Plans and artifacts name graphs by it: a change of the text is a change of the format.
    assert chain(2, 3, 2).sha256() == "d678a391cd4bf2a7fdc69ab721898f84aae367ad5e97003488e9b38dccde94de"


def test_the_hash_does_not_depend_on_the_order_in_which_shapes_were_put_in():
    graph = residual_graph()
    assert replace(graph, shapes=dict(reversed(graph.shapes.items()))).sha256() == graph.sha256()


def test_the_hash_sees_a_single_entry():
    graph = chain(2, 3, 2)
    member = graph.groups[0].members[0]
    other = Member(member.tensor, member.dim, torch.tensor([[0], [2], [1]]), member.role)
    changed = replace(graph.groups[0], members=(other, *graph.groups[0].members[1:]))
    assert replace(graph, groups=(changed,)).sha256() != graph.sha256()
    assert replace(graph, groups=(changed,)) != graph


@pytest.mark.parametrize(
    ("index_CK", "encoded"),
    [
        (index(2048), {"shape": [2048, 1], "rows": [[0, 1, 2048]]}),
        (index(512, width=49, start=7), {"shape": [512, 49], "rows": [[7, 1, 512 * 49]]}),
        # the two halves that a chunk ties, read by columns
        (torch.stack([torch.arange(8), torch.arange(8) + 8], 1), {"shape": [8, 2], "columns": [[0, 1, 16]]}),
        (torch.tensor([[3]]), {"shape": [1, 1], "rows": [[3, 0, 1]]}),
    ],
)
def test_regular_indices_take_one_run(index_CK, encoded):
    assert encode_index(index_CK) == encoded
    assert torch.equal(decode_index(encoded), index_CK)


@given(st.integers(0, 5), st.integers(1, 4), st.data())
def test_any_index_survives_encoding(size, width, data):
    values = data.draw(st.lists(st.integers(0, 40), min_size=size * width, max_size=size * width))
    index_CK = torch.tensor(values, dtype=torch.int64).reshape(size, width)
    found = decode_index(json.loads(json.dumps(encode_index(index_CK))))
    assert found.dtype == torch.int64
    assert torch.equal(found, index_CK)


def test_groups_move_to_the_frozen_with_the_given_reason():
    graph = residual_graph()
    frozen = Frozen("a", 12, "trial cut", "b (net.py:3)", "it differs")
    less = graph.without({"a": frozen})
    assert [group.name for group in less.groups] == ["conv"]
    assert less.frozen == (frozen,)
    assert [group.name for group in graph.groups] == ["conv", "a"]


def test_an_unknown_group_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no group 'layer9' in this graph; known groups: conv, a\."):
        residual_graph().group("layer9")
    with pytest.raises(ValueError, match="no group 'layer9'"):
        residual_graph().without({"layer9": Frozen("layer9", 1, "", "", "")})


def counts(**channels: tuple[int, ...]) -> Size:
    """A size that counts these channels and two positions that stay."""
    return Size("block", "", None, ("forward", "merge"), 3, 8, "C // 2", channels, fixed=2)


def test_a_size_counts_each_position_of_the_channels_that_are_kept():
    size = counts(conv=(0, 0, 1, 5), a=(2,))
    assert size.value({}) == 2 + 4 + 1
    assert size.value({"conv": {0, 5}}) == 2 + 3 + 1
    assert size.value({"conv": {1}, "a": {3}, "elsewhere": {0}}) == 2 + 1
    assert replace(size, negative=True).value({"conv": {0, 5}}) == -6


def test_a_size_without_a_group_counts_its_channels_as_positions_that_stay():
    size = counts(conv=(0, 0, 1, 5), a=(2,)).without({"conv"})
    assert (size.channels, size.fixed) == ({"a": (2,)}, 6)
    assert size.value({"conv": {0}, "a": set()}) == 6


def test_the_channels_of_a_group_that_is_frozen_count_among_those_that_stay():
    graph = replace(residual_graph(), sizes=(counts(conv=(0, 1), a=(2,)), counts(a=(0, 1))))
    less = graph.without({"a": Frozen("a", 12, "", "", "")})
    assert [(size.channels, size.fixed) for size in less.sizes] == [({"conv": (0, 1)}, 3), ({}, 4)]


def test_sizes_heads_and_calls_survive_json_and_enter_the_hash():
    graph = residual_graph()
    site = Site("fc", -1, index(8, width=4), call=(3, 1, "matmul"))
    groups = (replace(graph.groups[0], consumers=(site,)), graph.groups[1])
    sizes = (counts(conv=(7, 0, 0, 3)), replace(counts(a=(1,)), attribute="parts", element=1, negative=True))
    changed = [replace(graph, groups=groups), replace(graph, sizes=sizes), replace(graph, heads=("blocks.0.attn",))]
    for other in changed:
        assert Graph.from_json(other.to_json()) == other
    assert len({other.sha256() for other in [graph, *changed]}) == 4


@given(st.lists(st.integers(0, 30), max_size=12).map(tuple))
def test_any_order_of_counted_channels_survives_a_list(channels):
    size = counts(conv=channels)
    assert Size.from_list(json.loads(json.dumps(size.to_list()))) == size


def test_members_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"group g has 3 channels, w indexes 2\."):
        Group("g", 3, (Member("w", 0, index(2), "out"),), ())
    with pytest.raises(ValueError, match=r"int64 \[C, K\], got torch.float32"):
        Member("w", 0, torch.zeros(2, 1), "out")
    with pytest.raises(ValueError, match=r"int64 \[C, K\], got torch.int64 \[2\]"):
        Site("m", 1, torch.arange(2))
    with pytest.raises(ValueError, match="'output' is none of out, in, affine"):
        Member("w", 0, index(2), "output")
