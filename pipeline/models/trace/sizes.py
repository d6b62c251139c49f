"""Sizes that a network's code states: which expression in its source says how many channels there are.

`reshape(B, N, self.num_heads, C // self.num_heads)` holds two of them, `x[:, : self.dim]` one. A cut changes what they
have to say: an attribute gets its new value, any other expression its new number in a copy of the method that belongs to
the one module (`models.standalone.rewrite`). Here such places are found while the code runs: the instruction that called
torch has an exact position in the source, and labels tell what each argument counts.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import CodeType, FrameType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipeline.models.standalone import original_class, parsed
from pipeline.models.trace.labels import Ids
from pipeline.models.trace.table import tensors_in

if TYPE_CHECKING:
    from pipeline.models.trace.tracer import Trace

Path = tuple[int | str, ...]
"""Where an argument stands: (2,) is the third, (1, 0) the first of the list that is the second."""


@dataclass(frozen=True, slots=True)
class Stated:
    """An expression in the source, run by one module, and the positions that it counts."""

    module: str
    functions: tuple[str, ...]
    """Method of the module, then the functions that it calls down to the one that holds the expression."""
    line: int
    """Of the expression, counted from the first line of its function."""
    column: int
    text: str
    """The expression as it stands."""
    attribute: str
    """Name, if the expression is an attribute of the module itself."""
    element: int | None
    """Position, where the attribute is a list."""
    ids: tuple[int, ...]
    negative: bool
    """The expression states minus the number."""
    repeats: bool
    """It is not what the call was given: elsewhere the function says the same again."""

    @property
    def place(self) -> tuple[Any, ...]:
        return self.module, self.functions, self.line, self.column, self.text


class PythonCall:
    """One call of a torch function by Python code: `x.reshape(...)`, `F.linear(...)`, `x[...]`."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int, frame: FrameType) -> None:
        self.name: str = getattr(func, "__name__", "")
        self.args, self.kwargs = args, kwargs
        self.index = index
        """How many calls the running module has made before."""
        self.tied: set[int] = set()
        """Axes of the result into which channels were split, but by which they do not go."""
        self._frame = frame

    @cached_property
    def tensors(self) -> list[Tensor]:
        return [value for value in tree_leaves((self.args, self.kwargs)) if isinstance(value, Tensor)]

    def stated_shape(self) -> list[Any]:
        """The shape that a view states, by axis of its result; empty if it states none."""
        first = SHAPED.get(self.name)
        if first is None or len(self.args) <= first:
            return []
        given = self.args[first] if isinstance(self.args[first], tuple | list) else self.args[first:]
        start = self.args[1] % self.args[0].dim() if self.name == "unflatten" and isinstance(self.args[1], int) else 0
        return [None] * start + list(given)

    def stated(self, trace: Trace, output: Any) -> Iterator[Stated]:
        """Sizes that this call has stated, now that it is done and the labels of its results are known."""
        counted = list(_counted(trace, self, output))
        place = self._place(trace) if counted else None
        if place is None:
            return
        module, functions, node, first, code = place
        for path, ids, negative in counted:
            found = _argument(node, path, self._is_method(node))
            if found is not None and not (isinstance(found[0], ast.Constant) and not ids.any()):
                expression, element = found
                text = ast.unparse(expression)
                own = _own_attribute(expression) or self._factor(trace, module, expression, len(ids))
                for same in _occurrences(code, expression, text):
                    at = (same.lineno - first, same.col_offset)
                    repeats = at != (expression.lineno - first, expression.col_offset)
                    yield Stated(module, functions, *at, text, own, element, tuple(ids.tolist()), negative, repeats)

    def _factor(self, trace: Trace, path: str, expression: ast.expr, size: int) -> str:
        """The attribute in `B * self.num_heads` that is as large as the whole, of one row: the number of rows may change."""
        module = next(f.module for f in reversed(trace.stack) if f.path == path)
        if not (isinstance(expression, ast.BinOp) and isinstance(expression.op, ast.Mult)):
            return ""
        names = {_own_attribute(expression.left), _own_attribute(expression.right)} - {""}
        equal = [name for name in names if _is_number(getattr(module, name, None)) and getattr(module, name) == size]
        return equal[0] if len(equal) == 1 else ""

    def resolves(self, trace: Trace, path: Path) -> bool:
        """Can the argument at `path` be found in the source?"""
        place = self._place(trace)
        return place is not None and _argument(place[2], path, self._is_method(place[2])) is not None

    def _is_method(self, node: ast.Call | ast.Subscript) -> bool:
        """x.view(...), not torch.view(x, ...)."""
        base = node.func.value if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
        root = base
        while isinstance(root, ast.Attribute):
            root = root.value
        is_module = isinstance(root, ast.Name) and isinstance(self._frame.f_globals.get(root.id), ModuleType)
        return base is not None and not is_module

    def _place(self, trace: Trace) -> tuple[str, tuple[str, ...], ast.Call | ast.Subscript, int, CodeType] | None:
        frame: FrameType | None = self._frame
        assert frame is not None
        position = list(frame.f_code.co_positions())[frame.f_lasti // 2]
        while frame.f_code.co_name in COMPREHENSIONS and frame.f_back is not None:
            frame = frame.f_back
        node = _node(frame.f_code, position[1], position[3])
        codes: list[CodeType] = []
        while frame is not None and node is not None:
            codes.insert(0, frame.f_code)
            owner = owner_of(frame)
            path = next((f.path for f in reversed(trace.stack) if f.module is owner), None)
            if owner is not None and path is not None and (first := _first_line(original_class(owner), codes)):
                return path, tuple(code.co_name for code in codes), node, first, codes[-1]
            frame = frame.f_back
        return None


def owner_of(frame: FrameType) -> nn.Module | None:
    """The module whose method a frame runs: the function's first argument."""
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return first if isinstance(first, nn.Module) else None


COMPREHENSIONS = ("<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>")


def _occurrences(code: CodeType, expression: ast.expr, text: str) -> list[ast.expr]:
    """The expression, and where the function says the same again: `q * (C // num_heads) ** -0.5`; `C % groups` of an
    argument `groups` that keeps its value."""
    if not isinstance(expression, ast.BinOp | ast.Name):
        return [expression]
    nodes = [node for statement in getattr(_tree(code), "body", []) for node in ast.walk(statement)]
    if isinstance(expression, ast.Name):
        is_argument = text in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if not is_argument or any(_binds(node, text) for node in nodes):
            return [expression]
        asks = [node for node in nodes if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot)]
        asked = {id(operand) for node in asks for operand in (node.left, *node.comparators)}  # `groups is not None`
        nodes = [node for node in nodes if id(node) not in asked]
    return [node for node in nodes if isinstance(node, type(expression)) and ast.unparse(node) == text]


def _binds(node: ast.AST, name: str) -> bool:
    """Does the name mean something else from here on, or in a function that begins here?"""
    match node:
        case ast.Name():
            return node.id == name and not isinstance(node.ctx, ast.Load)
        case ast.alias():
            return name == (node.asname or node.name.partition(".")[0])
        case ast.Attribute() | ast.keyword() | ast.Constant():
            return False
    return any(name == field or (isinstance(field, list) and name in field) for _, field in ast.iter_fields(node))


def _first_line(cls: type, codes: Sequence[CodeType]) -> int | None:
    """First line of the last of these functions, if they are a method of `cls` and what it calls by global names."""
    scope: Any = None
    function: Any = None
    for code in codes:
        function = getattr(cls, code.co_name, None) if scope is None else scope.get(code.co_name)
        function = function and inspect.unwrap(function)
        own = getattr(function, "__code__", None)
        # A rewritten function begins with its first line without decorators.
        if own is None or own.co_filename != code.co_filename or not 0 <= code.co_firstlineno - own.co_firstlineno < 8:
            return None
        scope = function.__globals__
    return int(function.__code__.co_firstlineno)


@lru_cache(maxsize=4096)
def _node(code: CodeType, end_line: int | None, end_column: int | None) -> ast.Call | ast.Subscript | None:
    """Of all calls and subscriptions in a function, the one that ends here."""
    for node in ast.walk(_tree(code)):
        ends = (getattr(node, "end_lineno", None), getattr(node, "end_col_offset", None)) == (end_line, end_column)
        if ends and isinstance(node, ast.Call | ast.Subscript):
            return node
    return None


@lru_cache(maxsize=512)
def _tree(code: CodeType) -> ast.AST:
    """The source of a function, with the lines and columns of its file; empty if it cannot be had."""
    try:
        definition: ast.AST = parsed(code)[0]
    except (OSError, TypeError, SyntaxError):  # no file; a lambda in the middle of a call
        return ast.Module([], [])
    return definition


def _argument(node: ast.Call | ast.Subscript, path: Path, is_method: bool) -> tuple[ast.expr, int | None] | None:
    """The expression at `path`; with the position in it, where it is an attribute that is a list."""
    if isinstance(node, ast.Subscript):
        return _bound(node, path)
    offset = int(is_method)  # the tensor stands before the dot
    first, *rest = path
    named = {keyword.arg: keyword.value for keyword in node.keywords}
    if isinstance(first, str):
        expression = named.get(first)
    elif any(isinstance(argument, ast.Starred) for argument in node.args) or not 0 <= first - offset < len(node.args):
        return None
    else:
        expression = node.args[first - offset]
    if expression is None or not rest:
        return (expression, None) if expression is not None else None
    (element,) = rest
    assert isinstance(element, int)
    if isinstance(expression, ast.List | ast.Tuple):
        starred = any(isinstance(part, ast.Starred) for part in expression.elts)
        return (expression.elts[element], None) if not starred and element < len(expression.elts) else None
    return (expression, element) if _own_attribute(expression) else None


def _bound(node: ast.Subscript, path: Path) -> tuple[ast.expr, int | None] | None:
    """A bound of a slice: path is (element of the index, "lower" or "upper")."""
    element, side = path
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    assert isinstance(element, int)
    if any(isinstance(part, ast.Starred) for part in parts) or element >= len(parts):
        return None
    part = parts[element]
    expression = getattr(part, str(side)) if isinstance(part, ast.Slice) else None
    return (expression, None) if expression is not None else None


def _own_attribute(expression: ast.expr) -> str:
    """ "num_heads" for `self.num_heads`, else nothing."""
    if isinstance(expression, ast.Attribute) and isinstance(expression.value, ast.Name):
        return expression.attr if expression.value.id == "self" else ""
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# --- what each function's arguments count -----------------------------------------------------------------------------

CONVOLUTIONS = frozenset(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3))
GROUPS = 6
"""The argument of each of them that states the groups."""
NORMED = {"layer_norm": 1, "rms_norm": 1}
"""Functions that state the shape over which they normalise -> the argument that does."""
SHAPED = {"reshape": 1, "view": 1, "expand": 1, "unflatten": 2}
"""Functions that state the shape of their result -> the first argument that does."""


def _counted(trace: Trace, call: PythonCall, output: Any) -> Iterator[tuple[Path, Ids, bool]]:
    """(argument, slots of the positions that it counts, is it negative)."""
    if call.name in SHAPED and isinstance(output, Tensor):
        yield from _shape(trace, call, output)
    elif call.name == "split" and len(call.args) > 1:
        yield from _split(trace, call, list(tensors_in(output)))
    elif call.name in NORMED and len(call.args) > 1 and isinstance(call.args[1], tuple | list):
        label, first = trace.label(output), output.dim() - len(call.args[1])
        for i in range(len(call.args[1])):
            if label is not None and first + i in label.axes:
                yield (1, i), label.axes[first + i], False
    elif call.name == "group_norm" and len(call.args) > 1 and isinstance(output, Tensor):
        label = trace.label(output)
        if label is not None and 1 in label.axes and call.args[1] > 1:
            yield (1,), label.axes[1].reshape(call.args[1], -1)[:, 0], False
    elif call.name in CONVOLUTIONS and isinstance(output, Tensor):
        label, groups = trace.label(output), _groups(call)
        if label is not None and 1 in label.axes and groups is not None and groups[1] > 1:
            yield (groups[0],), label.axes[1].reshape(groups[1], -1)[:, 0], False
    elif call.name == "narrow" and len(call.args) == 4:
        yield from _narrowed(trace, call)
    elif call.name == "__getitem__":
        for axis, element, part in sliced_axes(call.args[0], call.args[1]):
            label = trace.label(call.args[0])
            if label is not None and axis in label.axes:
                yield from ((p, ids, negative) for p, ids, negative in _bounds(element, part, label.axes[axis]))


def _shape(trace: Trace, call: PythonCall, output: Tensor) -> Iterator[tuple[Path, Ids, bool]]:
    label, first = trace.label(output), SHAPED[call.name]
    if label is None or len(call.args) <= first:
        return
    nested, sizes = isinstance(call.args[first], tuple | list), call.stated_shape()
    start = len(sizes) - len(call.args[first] if nested else call.args[first:])
    for axis, size in enumerate(sizes):
        ids = label.axes.get(axis)
        if ids is None and axis in call.tied and size != -1:
            ids = np.zeros(size, dtype=np.int64)  # the width of a head stays, whatever the code works it out from
        if ids is not None and isinstance(size, int) and size == len(ids):
            yield ((first, axis - start) if nested else (first + axis - start,)), ids, False


def _split(trace: Trace, call: PythonCall, parts: list[Tensor]) -> Iterator[tuple[Path, Ids, bool]]:
    stated, dim = call.args[1], call.kwargs.get("dim", call.args[2] if len(call.args) > 2 else 0)
    for i, part in enumerate(parts if isinstance(stated, tuple | list) else parts[:1]):
        label = trace.label(part)
        ids = label.axes.get(dim % part.dim()) if label else None
        if ids is not None:
            yield ((1, i) if isinstance(stated, tuple | list) else (1,)), ids, False


def _groups(call: PythonCall) -> tuple[int | str, int] | None:
    """Where a convolution states its groups, and how many."""
    if "groups" in call.kwargs:
        return "groups", call.kwargs["groups"]
    return (GROUPS, call.args[GROUPS]) if len(call.args) > GROUPS else None


def _narrowed(trace: Trace, call: PythonCall) -> Iterator[tuple[Path, Ids, bool]]:
    x, dim, start, length = call.args
    label = trace.label(x)
    ids = label.axes.get(dim % x.dim()) if label else None
    if ids is not None and start >= 0:
        yield (2,), ids[:start], False
        yield (3,), ids[start : start + length], False


def sliced_axes(x: Tensor, index: Any) -> Iterator[tuple[int, int, slice]]:
    """(axis, position in the index, slice) of each slice of `x[index]`."""
    parts = index if isinstance(index, tuple) else (index,)
    taken = sum(part is not None and part is not Ellipsis for part in parts)
    axis = 0
    for position, part in enumerate(parts):
        if part is Ellipsis:
            axis += x.dim() - taken
        elif part is not None:
            if isinstance(part, slice):
                yield axis, position, part
            axis += 1


def _bounds(element: int, part: slice, ids: Ids) -> Iterator[tuple[Path, Ids, bool]]:
    for side, bound in (("lower", part.start), ("upper", part.stop)):
        if isinstance(bound, int) and bound != 0 and abs(bound) <= len(ids):
            yield (element, side), (ids[:bound] if bound > 0 else ids[bound:]), bound < 0
