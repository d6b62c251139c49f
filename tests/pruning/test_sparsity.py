"""Sparsity: what each pattern and scope keeps, to the count and to the index, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.pruning import sparsity
from pipeline.pruning.sparsity import (
    block_scores,
    expand_blocks,
    fits,
    fraction_within,
    largest_per_row,
    n_of_m,
    num_competing,
    weight_masks,
)
from tests.pruning.test_selection import OneAtATime

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@st.composite
def scores(draw: st.DrawFn, unit: int = 1) -> Tensor:
    """Signed scores [O, I, ...] with many ties and zeros of both signs; `unit` divides I."""
    shape = [draw(st.integers(1, 3)), unit * draw(st.integers(1, 3)), *draw(st.lists(st.integers(1, 2), max_size=2))]
    numel = int(torch.tensor(shape).prod())
    values = draw(st.lists(st.sampled_from([-2.0, -0.0, 0.0, 1.0, 3.0]), min_size=numel, max_size=numel))
    return torch.tensor(values, dtype=draw(st.sampled_from(DTYPES))).reshape(shape)


def _first_largest(values: list[float], k: int) -> list[bool]:
    kept = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    return [i in kept for i in range(len(values))]


# --- N:M ------------------------------------------------------------------------------------------------------------


def test_two_of_four_of_a_linear_layer_by_hand():
    score = torch.tensor([[1.0, 4.0, 2.0, 3.0, -1.0, -3.0, -2.0, -4.0]])
    assert n_of_m(score, 2, 4).tolist() == [[False, True, False, True, True, False, True, False]]


def test_of_equal_scores_of_a_group_the_first_stay():
    score = torch.tensor([[5.0, 5.0, 5.0, 5.0], [1.0, 2.0, 2.0, 2.0], [-0.0, 0.0, -0.0, -1.0]])
    assert n_of_m(score, 2, 4).tolist() == [
        [True, True, False, False],
        [False, True, True, False],
        [True, True, False, False],
    ]


def test_groups_of_a_convolution_run_along_the_input_channels():
    # [1, 4, 1, 2]: at kernel position 0 the channels score 1 2 3 4, at position 1 they score 8 7 6 5.
    score = torch.tensor([[1.0, 8.0], [2.0, 7.0], [3.0, 6.0], [4.0, 5.0]]).reshape(1, 4, 1, 2)
    mask = n_of_m(score, 1, 4)
    assert mask[0, :, 0, 0].tolist() == [False, False, False, True]
    assert mask[0, :, 0, 1].tolist() == [True, False, False, False]


@given(st.data())
def test_every_group_keeps_exactly_its_n_largest(data):
    m = data.draw(st.integers(1, 5))
    n, score = data.draw(st.integers(0, m)), data.draw(scores(unit=m))
    mask = n_of_m(score, n, m)
    assert mask.shape == score.shape
    groups = zip(*(t.movedim(1, -1).reshape(-1, m).tolist() for t in (score, mask)), strict=True)
    for values, kept in groups:
        assert kept == _first_largest(values, n)


def test_a_mask_depends_neither_on_layout_nor_on_gradients():
    score = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = n_of_m(score, 2, 4)
    assert torch.equal(n_of_m(score.contiguous(memory_format=torch.channels_last), 2, 4), expected)
    assert torch.equal(n_of_m(score.clone().requires_grad_(), 2, 4), expected)


@pytest.mark.parametrize("shape", [(4, 6), (8,), (4, 3, 7, 7)])
def test_inputs_that_do_not_divide_are_refused_with_the_shape(shape):
    for rule in (lambda score: n_of_m(score, 2, 4), lambda score: block_scores(score, 4)):
        with pytest.raises(ValueError, match=r"shape \[[\d, ]+\] has no inputs .* by 4. Leave it whole") as refusal:
            rule(torch.ones(shape))
        assert str(list(shape)) in str(refusal.value)


def test_groups_and_blocks_have_a_size():
    with pytest.raises(ValueError, match="divide by 0"):
        n_of_m(torch.ones(1, 4), 0, 0)
    with pytest.raises(ValueError, match="divide by -2"):
        block_scores(torch.ones(1, 4), -2)


@pytest.mark.parametrize("n", [-1, 5])
def test_a_group_keeps_between_none_and_all(n):
    with pytest.raises(ValueError, match=rf"n \({n}\) of {n}:4 must lie between 0 and 4"):
        n_of_m(torch.ones(1, 4), n, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_do_not_compare_are_refused_with_their_place(value):
    score = torch.ones(2, 4)
    score[1, 2] = value
    for rule in (lambda: n_of_m(score, 2, 4), lambda: largest_per_row(score, 1)):
        with pytest.raises(ValueError, match=rf"score at \[1, 2\] is {value}; scores must be finite"):
            rule()


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_row_is_all_that_an_output_reads():
    score = torch.tensor([[[1.0, 5.0], [4.0, 2.0]], [[9.0, 8.0], [7.0, 9.0]]])
    assert largest_per_row(score, 2).tolist() == [[[False, True], [True, False]], [[True, False], [False, True]]]


def test_of_equal_scores_of_a_row_the_first_stay():
    assert largest_per_row(torch.tensor([[2.0, 3.0, 2.0, 2.0], [0.0, -0.0, 0.0, -0.0]]), 3).tolist() == [
        [True, True, True, False],
        [True, True, True, False],
    ]


@given(scores(), st.data())
def test_every_row_keeps_exactly_its_largest(score, data):
    num_keep = data.draw(st.integers(0, score[0].numel()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsity, "ROWS_NUMEL", data.draw(st.sampled_from([1, 2 * score[0].numel()])))
        mask = largest_per_row(score, num_keep)
    assert mask.shape == score.shape
    for values, kept in zip(score.flatten(1).tolist(), mask.flatten(1).tolist(), strict=True):
        assert kept == _first_largest(values, num_keep)


@pytest.mark.parametrize("num_keep", [-1, 5])
def test_a_row_keeps_between_none_and_all(num_keep):
    with pytest.raises(ValueError, match=rf"num_keep \({num_keep}\) must lie between 0 and 4, the length of a row"):
        largest_per_row(torch.ones(3, 4), num_keep)


@pytest.mark.parametrize("shape", [(2, 0), (0, 4)])
def test_a_weight_without_entries_has_a_mask_without_entries(shape):
    assert n_of_m(torch.ones(shape), 2, 4).shape == shape
    assert largest_per_row(torch.ones(shape), 0).shape == shape


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_block_scores_by_hand():
    linear = torch.tensor([[1.0, 2.0, 3.0, -4.0]])
    assert block_scores(linear, 2).tolist() == [[3.0, -1.0]]
    convolution = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]]).reshape(1, 4, 1, 2)
    assert block_scores(convolution, 2).tolist() == [[[[3.0, 30.0]], [[7.0, 70.0]]]]


def test_heads_of_a_projection_go_for_all_outputs_by_hand():
    # Two outputs, three heads of two inputs: sums over outputs and inputs are 1 + 2 + 0 + 1 = 4, 0, and 9.
    score = torch.tensor([[1.0, 2.0, 0.0, 0.0, 4.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0, 5.0]])
    assert block_scores(score, 2, all_outputs=True).tolist() == [[4.0, 0.0, 9.0]]
    masks = weight_masks({"proj": score}, pattern="input:2", keep=0.67, scope="global")
    assert masks["proj"].tolist() == [[True, True, False, False, True, True]] * 2
    kernel = torch.ones(2, 4, 3, 3)
    kernel[:, 1] = 0
    mask = weight_masks({"conv": kernel}, pattern="input:1", keep=0.75, scope="layer")["conv"]
    assert mask.shape == kernel.shape
    assert mask.all((0, 2, 3)).tolist() == mask.any(3).any(2).any(0).tolist() == [True, False, True, True]
    assert not fits((8,), "input:1")


def test_block_scores_are_added_in_double_precision():
    # In float32, 1e8 + 1 is 1e8; in float16, 60000 + 60000 is infinite.
    assert block_scores(torch.tensor([[1e8, 1.0, 1.0, -1e8]]), 4).tolist() == [[2.0]]
    half = block_scores(torch.tensor([[60000.0, 60000.0]], dtype=torch.float16), 2)
    assert (half.tolist(), half.dtype) == ([[120000.0]], torch.float32)
    assert block_scores(torch.ones(1, 2, dtype=torch.float64), 2).dtype == torch.float64


def test_block_scores_leave_their_argument_as_it_was():
    for dtype in DTYPES:
        score = torch.ones(2, 4, dtype=dtype)
        block_scores(score, 2)
        assert torch.equal(score, torch.ones(2, 4, dtype=dtype))


def test_block_scores_have_the_same_bits_in_every_layout():
    score = torch.randn(8, 16, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    last = score.contiguous(memory_format=torch.channels_last)
    assert torch.equal(block_scores(score, 8), block_scores(last, 8))


def test_a_block_mask_covers_its_inputs():
    mask = torch.tensor([[True, False], [False, True]])
    assert expand_blocks(mask, 2).tolist() == [[True, True, False, False], [False, False, True, True]]
    assert expand_blocks(mask.reshape(2, 2, 1, 1), 3).shape == (2, 6, 1, 1)


# --- a network --------------------------------------------------------------------------------------------------------

NETWORK = {
    "b": torch.tensor([[9.0, 1.0, 8.0, 2.0], [3.0, 7.0, 4.0, 6.0]]),
    "a": torch.tensor([[5.0, 0.0], [0.5, 0.25]]),
}


def test_unstructured_global_masks_compare_all_weights():
    masks = weight_masks(NETWORK, pattern="unstructured", keep=0.5, scope="global")
    assert masks["b"].tolist() == [[True, False, True, False], [False, True, True, True]]
    assert masks["a"].tolist() == [[True, False], [False, False]]
    assert list(masks) == ["b", "a"]


def test_unstructured_layer_masks_keep_the_same_fraction_of_each():
    masks = weight_masks(NETWORK, pattern="unstructured", keep=0.5, scope="layer")
    assert masks["b"].tolist() == [[True, False, True, False], [False, True, False, True]]
    assert masks["a"].tolist() == [[True, False], [True, False]]


def test_unstructured_row_masks_keep_the_same_fraction_of_each_output():
    masks = weight_masks(
        {"b": NETWORK["b"] * torch.tensor([[1.0], [9.0]])}, pattern="unstructured", keep=0.75, scope="row"
    )
    assert masks["b"].tolist() == [[True, False, True, True], [False, True, True, True]]


def test_blocks_by_hand_in_every_scope():
    # Sums of the blocks: b has 10 10 / 10 10, a has 5 / 0.75.
    def masks(scope: str, keep: float = 0.5) -> dict[str, list[list[bool]]]:
        return {n: m.tolist() for n, m in weight_masks(NETWORK, pattern="block:2", keep=keep, scope=scope).items()}

    assert masks("global") == {"b": [[True, True, True, True], [True, True, False, False]], "a": [[False] * 2] * 2}
    assert masks("layer") == {"b": [[True] * 4, [False] * 4], "a": [[True, True], [False, False]]}
    assert masks("row", 1.0) == {"b": [[True] * 4] * 2, "a": [[True] * 2] * 2}
    row = weight_masks({"b": NETWORK["b"]}, pattern="block:2", keep=0.5, scope="row")
    assert row["b"].tolist() == [[True, True, False, False]] * 2


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
@pytest.mark.parametrize("keep", [0.5, None])
def test_two_of_four_is_the_same_in_every_scope(scope, keep):
    masks = weight_masks({"b": NETWORK["b"]}, pattern="2:4", keep=keep, scope=scope)
    assert masks["b"].tolist() == [[True, False, True, False], [False, True, False, True]]


@given(st.data())
def test_the_global_count_is_the_floor_of_the_fraction_as_written(data):
    num, percent = data.draw(st.integers(100, 400)), data.draw(st.integers(1, 100))
    score = torch.zeros(2 * num).reshape(2, num)
    masks = weight_masks({"a": score, "b": score}, pattern="unstructured", keep=percent / 100, scope="global")
    assert sum(int(mask.sum()) for mask in masks.values()) == percent * 4 * num // 100


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_counts_are_floors_in_every_scope(scope):
    # 0.29 * 100 is 28.999999999999996 in floating point; in blocks of two, 0.29 of 50 is 14.5.
    masks = weight_masks({"w": torch.rand(2, 100)}, pattern="unstructured", keep=0.29, scope=scope)
    assert int(masks["w"].sum()) == 58
    blocks = weight_masks({"w": torch.rand(2, 100)}, pattern="block:2", keep=0.29, scope=scope)["w"]
    assert int(blocks.sum()) == {"global": 58, "layer": 58, "row": 56}[scope]
    assert torch.equal(blocks[:, ::2], blocks[:, 1::2])


@pytest.mark.parametrize(
    ("scope", "pattern", "num_keep", "kept"),
    [
        ("global", "unstructured", 7, 7),
        ("global", "block:2", 7, 6),
        ("layer", "unstructured", 7, 7),  # 5 of 8 and 2 of 4; three quarters would be 6 and 3
        ("row", "unstructured", 7, 6),  # half of each row; three quarters would be 3 + 3 + 1 + 1
        ("global", "unstructured", 12, 12),
        ("row", "unstructured", 99, 12),
    ],
)
def test_a_number_of_weights_is_met_as_closely_as_the_scope_allows(scope, pattern, num_keep, kept):
    masks = weight_masks(NETWORK, pattern=pattern, num_keep=num_keep, scope=scope)
    assert sum(int(mask.sum()) for mask in masks.values()) == kept


def test_a_fraction_that_leaves_a_row_without_blocks_shows_before_the_masks():
    shapes = {name: score.shape for name, score in NETWORK.items()}  # rows of two blocks and of one
    fraction = fraction_within(shapes, pattern="block:2", scope="row", num_keep=7)
    assert [int(fraction * num_competing(shape, "block:2", "row")) for shape in shapes.values()] == [1, 0]


@pytest.mark.parametrize(("num_keep", "kept"), [(0, None), (1, 1), (3, 1), (4, 4), (6, 4), (7, 7), (8, 8), (9, 8)])
def test_blocks_of_unlike_sizes_are_taken_by_score_while_they_fit(num_keep, kept):
    # By score: the first input of `narrow` (9, one weight), both of `wide` (6 and 5, three weights), the other of `narrow`.
    scores = {"wide": torch.tensor([[2.0, 1.0], [2.0, 2.0], [2.0, 2.0]]), "narrow": torch.tensor([[9.0, 1.0]])}
    if kept is None:
        with pytest.raises(ValueError, match="leaves none of the 4 scores"):
            weight_masks(scores, pattern="input:1", num_keep=num_keep, scope="global")
    else:
        masks = weight_masks(scores, pattern="input:1", num_keep=num_keep, scope="global")
        assert sum(int(mask.sum()) for mask in masks.values()) == kept


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:2", "1:2"])
def test_one_weight_is_in_memory_at_a_time(pattern, scope):
    class Rows(OneAtATime):
        def __getitem__(self, name: str) -> Tensor:
            return super().__getitem__(name).unflatten(0, (1, -1))

    lazy = Rows({"a": [1.0, 2.0, 0.0, 3.0], "b": [5.0, -1.0], "c": [0.0, 0.0]})
    masks = weight_masks(lazy, pattern=pattern, keep=0.5 if pattern == "1:2" else 1.0, scope=scope)
    assert [mask.shape[1] for mask in masks.values()] == [4, 2, 2]


# --- what fits, and what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "pattern", "expected"),
    [
        ((8, 16), "2:4", True),
        ((8, 16, 3, 3), "4:8", True),
        ((8, 12), "4:8", False),
        ((64, 3, 7, 7), "2:4", False),
        ((64, 1, 3, 3), "block:4", False),
        ((16,), "2:4", False),
        ((16,), "unstructured", True),
        ((8, 12), "block:4", True),
        ((8, 12), "block:8", False),
    ],
)
def test_a_shape_fits_if_its_inputs_divide(shape, pattern, expected):
    assert fits(shape, pattern) is expected


@pytest.mark.parametrize(
    "pattern", ["", "dense", "4:2", "4:4", "0:4", "2:4 ", "2:4:8", "block:1", "block:0", "block", "-2:4"]
)
def test_unknown_patterns_are_refused_with_the_known_ones(pattern):
    with pytest.raises(ValueError, match=r"is unknown; known patterns: unstructured, N:M .*, block:SIZE"):
        fits((4, 4), pattern)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "network"}, "scope 'network' is unknown; known scopes: global, layer, row"),
        ({"pattern": "2:3"}, "pattern 2:3, which keeps 0.66"),
        ({"pattern": "2:4", "keep": 0.25}, r"keep \(0.25\) contradicts pattern 2:4, which keeps 0.5"),
        ({"keep": None}, r"keep \(None\) must be above 0 and at most 1"),
        ({"keep": 0.0}, r"keep \(0.0\) must be above 0"),
        ({"keep": 1.5}, r"keep \(1.5\) must be above 0 and at most 1"),
        ({"keep": float("nan")}, r"keep \(nan\) must be above 0"),
        ({"keep": 0.01}, r"keep \(0.01\) leaves none of the 12 scores that compete"),
        ({"keep": 0.1, "scope": "layer"}, r"^b: keep \(0.1\) leaves none of the 8 scores that compete"),
        ({"keep": 0.2, "scope": "row"}, r"^b: keep \(0.2\) leaves none of the 4 scores that compete"),
        ({"pattern": "2:4", "scope": "row"}, r"^a: a weight of shape \[2, 2\] has no inputs .* divide by 4"),
        ({"pattern": "block:4"}, r"^a: a weight of shape \[2, 2\] has no inputs .* divide by 4"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        weight_masks(NETWORK, **{"pattern": "unstructured", "keep": 0.5, "scope": "global"} | options)


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:2", "2:4"])
def test_a_score_that_is_no_number_is_refused_with_the_name_of_its_weight(pattern, scope):
    bad = NETWORK["b"].clone()
    bad[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"^b\b.*\bnan\b"):
        weight_masks({"b": bad, "a": torch.ones(1, 4)}, pattern=pattern, keep=0.5, scope=scope)


def test_a_bias_has_no_rows():
    with pytest.raises(ValueError, match=r"^bias: a weight of shape \[3\] has no rows .* Leave it whole"):
        weight_masks({"bias": torch.ones(3)}, pattern="unstructured", keep=0.5, scope="row")
    assert weight_masks({"bias": torch.ones(3)}, pattern="unstructured", keep=0.7, scope="global")["bias"].sum() == 2


def test_masks_of_nothing_are_refused():
    with pytest.raises(ValueError, match="there are no scores: no weight fits pattern 2:4"):
        weight_masks({}, pattern="2:4", keep=None, scope="global")
