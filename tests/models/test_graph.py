"""The graph is plain data: it survives JSON, and its hash says what it holds and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.graph import Frozen, Graph, Group, Member, Site, decode_index, encode_index
from tests.graphs import chain, index, residual_graph


def test_json_gives_the_graph_back():
    graph = residual_graph()
    assert Graph.from_json(graph.to_json()) == graph
    assert Graph.from_json(graph.to_json()).sha256() == graph.sha256()


def test_the_hash_is_this_one_in_every_process():
    # Plans and artifacts name graphs by it: a change of the text is a change of the format.
    assert chain(2, 3, 2).sha256() == "48023c7a26a421d93c196616b2d73d4a2cdae5997a0379b10cced81ece71d1f8"


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


def test_members_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"group g has 3 channels, w indexes 2\."):
        Group("g", 3, (Member("w", 0, index(2), "out"),), ())
    with pytest.raises(ValueError, match=r"int64 \[C, K\], got torch.float32"):
        Member("w", 0, torch.zeros(2, 1), "out")
    with pytest.raises(ValueError, match=r"int64 \[C, K\], got torch.int64 \[2\]"):
        Site("m", 1, torch.arange(2))
    with pytest.raises(ValueError, match="'output' is none of out, in, affine"):
        Member("w", 0, index(2), "output")
