"""What rebuilds a network alone: attention with free sizes equals torch's own, and methods state other numbers."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pipeline.models import standalone
from pipeline.models.standalone import MultiheadAttention, edits_of, open_attention_, original_class, rewrite_

# N = rows, L = queries, S = keys, E = embedding, H = heads
N, L, S, E, H = 2, 3, 5, 12, 4


def both(**kwargs: object) -> tuple[nn.Module, nn.Module]:
    """torch's own attention and its opened copy, in eval mode."""
    torch.manual_seed(0)
    own = nn.MultiheadAttention(E, H, **kwargs).double().eval()
    for parameter in own.parameters():
        nn.init.normal_(parameter)
    opened = open_attention_(copy.deepcopy(own))
    assert type(opened) is MultiheadAttention
    assert type(own) is nn.MultiheadAttention
    return own, opened


def assert_equal_outputs(modules: tuple[nn.Module, nn.Module], *inputs: Tensor, **kwargs: object) -> None:
    own, opened = (module(*inputs, **kwargs) for module in modules)
    assert_close(opened[0], own[0])
    assert (opened[1] is None) == (own[1] is None)
    if own[1] is not None:
        assert_close(opened[1], own[1])


def rows(length: int, batch_first: bool) -> Tensor:
    shape = (N, length, E) if batch_first else (length, N, E)
    return torch.randn(shape, dtype=torch.float64)


MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "bool": lambda: torch.arange(L)[:, None] < torch.arange(S) - 2,
    "float": lambda: torch.randn(L, S, dtype=torch.float64),
    "bool 3-D": lambda: torch.arange(S).expand(N * H, L, S) == torch.arange(N * H)[:, None, None] % S,
    "float 3-D": lambda: torch.randn(N * H, L, S, dtype=torch.float64),
}
PADDINGS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "bool": lambda: torch.tensor([[False] * S, [False] * 3 + [True] * 2]),
    "float": lambda: torch.randn(N, S, dtype=torch.float64),
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_opened_attention_equals_torchs_own_with_every_mask(mask, padding):
    for need_weights, average, batch_first in itertools.product([True, False], repeat=3):
        modules, key = both(batch_first=batch_first), rows(S, batch_first)
        options = {"need_weights": need_weights, "average_attn_weights": average}
        given = {"attn_mask": MASKS[mask](), "key_padding_mask": PADDINGS[padding]()}
        assert_equal_outputs(modules, rows(L, batch_first), key, key + 1, **given, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("num_inputs", [1, 2, 3])
def test_opened_attention_equals_torchs_own_on_one_two_and_three_values(num_inputs, batch_first, bias):
    own = [rows(S, batch_first) for _ in range(num_inputs)]
    query, key, value = (own[min(i, num_inputs - 1)] for i in range(3))
    assert_equal_outputs(both(batch_first=batch_first, bias=bias), query, key, value)


@pytest.mark.parametrize("average", [True, False])
def test_opened_attention_equals_torchs_own_on_a_single_row(average):
    query, key = rows(L, True)[0], rows(S, True)[0]
    masks = {"attn_mask": MASKS["float"](), "key_padding_mask": torch.tensor([False] * 4 + [True])}
    assert_equal_outputs(both(), query, key, key, average_attn_weights=average)
    assert_equal_outputs(both(), query, key, key, average_attn_weights=average, attn_mask=masks["attn_mask"])
    assert_equal_outputs(both(), query, key, key, key_padding_mask=masks["key_padding_mask"])


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_layer_of_torch_computes_the_same(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True, norm_first=norm_first).eval()
    x = torch.randn(N, S, E)
    with torch.no_grad():
        expected = layer(x)
        assert_close(open_attention_(layer)(x), expected)


def test_dropout_falls_on_the_attention_weights():
    _, opened = both(dropout=0.999999, bias=False)
    x = rows(S, False)
    assert not opened.train()(x, x, x)[0].any()
    assert opened.eval()(x, x, x)[0].any()


@pytest.mark.parametrize("kwargs", [{"kdim": 3, "vdim": 5}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_other_kinds_of_attention_stay_torchs_own(kwargs):
    assert type(open_attention_(nn.MultiheadAttention(E, H, **kwargs))) is nn.MultiheadAttention


class Own(nn.MultiheadAttention):
    pass


def test_attention_of_a_class_of_ones_own_stays():
    assert type(open_attention_(Own(E, H))) is Own


# --- other numbers in the source --------------------------------------------------------------------------------------


class Base(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 4)


class Stating(Base):
    """A method that asks its parent, and one that asks helpers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(4, 2) + 0)

    def helped(self, x: Tensor) -> Tensor:
        return outer(x)


def outer(x: Tensor) -> Tensor:
    return inner(x, 1)


def inner(x: Tensor, factor: int) -> Tensor:
    return x.reshape(2, 4) * factor


def edit(functions: list[str], line: int, column: int, text: str, number: int) -> list[object]:
    return [functions, line, column, text, number]


def test_one_module_gets_another_number_and_its_class_stays():
    module, other = Base(), Base()
    rewrite_(module, [edit(["forward"], 1, 28, "4", 3)])
    assert module(torch.arange(6)).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert other(torch.arange(8)).shape == (2, 4)
    assert isinstance(module, Base)
    assert (type(module).__name__, type(module).__module__) == ("Base", __name__)
    assert (original_class(module), original_class(other)) == (Base, Base)
    assert (edits_of(module), edits_of(other)) == ([edit(["forward"], 1, 28, "4", 3)], [])


def test_a_second_rewrite_starts_from_the_original_again():
    module = Base()
    rewrite_(module, [edit(["forward"], 1, 28, "4", 3)])
    rewrite_(module, [edit(["forward"], 1, 25, "2", 1)])
    assert module(torch.arange(4)).shape == (1, 4)
    assert type(module).__mro__[1] is Base


def test_two_numbers_of_one_method_change_together():
    module = Base()
    rewrite_(module, [edit(["forward"], 1, 25, "2", 1), edit(["forward"], 1, 28, "4", 3)])
    assert module(torch.arange(3)).shape == (1, 3)


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 8 // 2) + 8


WHOLE = edit(["forward"], 1, 28, "8 // 2", 3)
PART = edit(["forward"], 1, 28, "8", 6)  # begins where the whole begins


@pytest.mark.parametrize("edits", [[WHOLE, PART], [PART, WHOLE]])
def test_a_whole_takes_its_parts_along_and_the_same_elsewhere_has_a_number_of_its_own(edits):
    module = Halved()
    rewrite_(module, [*edits, edit(["forward"], 1, 38, "8", 10)])
    assert module(torch.arange(6)).tolist() == [[10, 11, 12], [13, 14, 15]]


def test_a_part_changes_alone_where_the_whole_has_no_number():
    module = Halved()
    rewrite_(module, [PART])
    assert module(torch.arange(6)).tolist() == [[8, 9, 10], [11, 12, 13]]


def test_a_whole_that_reads_otherwise_is_refused_though_its_part_is_there():
    with pytest.raises(ValueError, match="no longer reads 8 // 4"):
        rewrite_(Halved(), [edit(["forward"], 1, 28, "8 // 4", 2), PART])


def test_super_still_finds_the_parent():
    module = Stating()
    rewrite_(module, [edit(["forward"], 1, 44, "2", 3)])
    with pytest.raises(RuntimeError, match=r"shape '\[2, 4\]' is invalid for input of size 12"):
        module(torch.arange(12))
    rewrite_(module, [edit(["forward"], 1, 41, "4", 8), edit(["forward"], 1, 44, "2", 1)])
    assert module(torch.arange(8)).shape == (2, 4)


def test_helpers_down_to_the_expression_are_copied_for_this_module_alone():
    module = Stating()
    rewrite_(module, [edit(["helped", "outer", "inner"], 1, 24, "4", 3)])
    assert module.helped(torch.arange(6)).shape == (2, 3)
    assert Stating().helped(torch.arange(8)).shape == (2, 4)
    assert outer(torch.arange(8)).shape == (2, 4)


def made(width: int) -> type[nn.Module]:
    """A class whose method closes over a number."""

    class Made(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 4) * width

    return Made


def test_what_a_method_closes_over_stays():
    module = made(10)()
    rewrite_(module, [edit(["forward"], 1, 32, "4", 3)])
    assert module(torch.arange(6)).tolist() == [[0, 10, 20], [30, 40, 50]]


def times(factor: int) -> Callable[..., Callable[..., Tensor]]:
    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def wrapper(*args: Tensor) -> Tensor:
            return function(*args) * factor

        return wrapper

    return decorate


class Decorated(nn.Module):
    @times(10)
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 4) + 0


def test_decorators_go_along_and_lines_are_counted_from_the_first():
    module = Decorated()
    rewrite_(module, [edit(["forward"], 3, 28, "4", 3)])
    out = module(torch.arange(6.0, requires_grad=True))
    assert out.tolist() == [[0, 10, 20], [30, 40, 50]]
    assert not out.requires_grad
    assert Decorated()(torch.arange(8.0)).shape == (2, 4)


class Elsewhere:
    """A decorator that hides the function in an object."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        functools.update_wrapper(self, function)

    def __call__(self, x: Tensor) -> Tensor:
        return self.__wrapped__(x)


@Elsewhere
def hidden(x: Tensor) -> Tensor:
    return x.reshape(2, 4)


class Hiding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return hidden(x)


def test_a_decorator_that_cannot_be_carried_over_is_refused():
    with pytest.raises(ValueError, match="hidden is decorated by something"):
        rewrite_(Hiding(), [edit(["forward", "hidden"], 2, 24, "4", 3)])


class Defaults(nn.Module):
    """Names in the signature that only the class knows, or only a type checker."""

    FACTOR = 2

    def forward(self, x: Unknown, y: int = FACTOR, *, z: int = FACTOR + 1) -> Unknown:  # noqa: F821
        return x.reshape(2, 4) * y * z


def test_defaults_stay_and_annotations_are_not_evaluated():
    module = Defaults()
    rewrite_(module, [edit(["forward"], 1, 28, "4", 3)])
    assert module(torch.arange(6)).tolist() == [[0, 6, 12], [18, 24, 30]]


@pytest.mark.parametrize(
    "wrong",
    [edit(["forward"], 1, 28, "5", 3), edit(["forward"], 2, 28, "4", 3), edit(["forward"], 1, 27, "4", 3)],
    ids=["text", "line", "column"],
)
def test_a_source_that_reads_otherwise_is_refused_by_what_is_missing(wrong):
    module = Base()
    with pytest.raises(ValueError, match=rf"Base\.forward no longer reads {wrong[3]}: its source has changed"):
        rewrite_(module, [wrong])
    assert type(module) is Base


def test_a_helper_that_reads_otherwise_is_refused_by_name():
    with pytest.raises(ValueError, match="inner no longer reads 9"):
        rewrite_(Stating(), [edit(["helped", "outer", "inner"], 1, 24, "9", 3)])


def test_a_factory_of_torchs_attention_is_opened():
    built = standalone.build("torch.nn:MultiheadAttention", {"embed_dim": 4, "num_heads": 2})
    assert type(built) is MultiheadAttention
