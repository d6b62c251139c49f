"""Rebuilds the pruned network beside this file: `from load import load; load()`. Needs torch, timm, safetensors."""

import ast
import functools
import importlib
import inspect
import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


def build(factory: str, kwargs: dict[str, Any]) -> nn.Module:
    module, _, name = factory.rpartition(":")
    library = importlib.import_module(module or "timm")
    model: nn.Module = (
        getattr(library, name)(**kwargs) if module else library.create_model(name, pretrained=False, **kwargs)
    )
    return open_attention_(model)


def rebuild(spec: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module) -> nn.Module:
    remove_(model, spec.get("removed", []))
    tensors = unpacked(tensors, spec.get("sparse", {}))
    dense = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    sources, names = {name: name for name in tensors} | spec["tied"], [*model.state_dict(), *spec["buffers"]]
    shapes = {name: list(tensors[source].shape) for name, source in sources.items()}
    wanted = {name: spec["shapes"].get(name, list(dense[name].shape)) for name in names}
    if shapes != wanted:
        wrong = sorted(name for name in shapes | wanted if shapes.get(name) != wanted.get(name))
        raise ValueError(f"weights and architecture do not fit in {', '.join(wrong[:5])} ({len(wrong)} tensors)")
    new = {name: nn.Parameter(tensor, tensor.is_floating_point()) for name, tensor in tensors.items()}
    for name, source in sources.items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, (new if isinstance(dense[name], nn.Parameter) else tensors)[source])
    for module, values in ((model.get_submodule(path), values) for path, values in spec["attributes"].items()):
        for name, value in values.items():
            setattr(module, name, tuple(value) if isinstance(getattr(module, name, None), tuple) else value)
    for path, edits in spec["functions"].items():
        rewrite_(model.get_submodule(path), edits)
    return model.eval()


def load(directory: str | Path = Path(__file__).parent) -> nn.Module:
    spec = json.loads(Path(directory, "architecture.json").read_text(encoding="utf-8"))
    return rebuild(
        spec, load_file(Path(directory, "model.safetensors")), build(spec["factory"], spec["factory_kwargs"])
    )


# --- tensors that are stored without their zeros ----------------------------------------------------------------------

VALUES, PLACES = ":values", ":places"
"""Endings of their two parts: what is not zero, and a bit for each place that tells whether it is there."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of an element. As integers, values are copied bit for bit, NaN too."""


def unpacked(tensors: dict[str, Tensor], shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    whole = dict(tensors)
    for name, shape in shapes.items():
        values, places = whole.pop(name + VALUES), whole.pop(name + PLACES)
        flat = torch.zeros(torch.Size(shape).numel(), dtype=INTEGERS[values.element_size()])
        there = ((places[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().flatten()
        flat[there[: len(flat)]] = values.view(flat.dtype)
        whole[name] = flat.view(values.dtype).reshape(shape)
    return whole


# --- residual blocks that are gone ------------------------------------------------------------------------------------


class Removed(nn.Module):
    """Stands where a residual block was: what came in goes on."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


def remove_(model: nn.Module, paths: Sequence[str]) -> None:
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Removed())


# --- sizes that stand in the source of a method -----------------------------------------------------------------------

Edit = Sequence[Any]
"""[functions, line, column, text, number]: in the last of `functions` (a method, and what it calls down to there) the
expression `text`, at this place after the function's first line, now states the number."""


def rewrite_(module: nn.Module, edits: Sequence[Edit]) -> None:
    """Give this one module a copy of its methods in which sizes are other numbers. Raises ValueError if they moved."""
    module.__class__ = _rewritten(original_class(module), json.dumps(edits))


@functools.lru_cache(maxsize=4096)
def _rewritten(cls: type, text: str) -> type:
    edits = json.loads(text)
    methods = {
        name: _edited(getattr(cls, name), [([*rest], *edit) for (first, *rest), *edit in edits if first == name])
        for name in dict.fromkeys(edit[0][0] for edit in edits)
    }  # fmt: skip

    def reduce(self: nn.Module, _protocol: int) -> tuple[Any, ...]:
        return _restored, (cls, text), self.__getstate__()  # type: ignore[operator]

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": reduce, "edits": edits}
    return type(cls.__name__, (cls,), {**methods, **names})


def _restored(cls: type, text: str) -> nn.Module:
    """An empty module of a rewritten class: how pickle and deepcopy begin, which cannot find the class by its name."""
    rewritten: Any = _rewritten(cls, text)
    module: nn.Module = rewritten.__new__(rewritten)
    return module


def original_class(module: nn.Module) -> type:
    """The class of a module without what `rewrite_` has changed."""
    return next(cls for cls in type(module).__mro__ if "edits" not in vars(cls))


def edits_of(module: nn.Module) -> list[Edit]:
    """What `rewrite_` has changed in this module."""
    return list(vars(type(module)).get("edits", []))


def _edited(function: Any, edits: list[Any]) -> Any:
    """The function with its own edits (those without further functions), and with edited copies of what it calls."""
    if hasattr(function, "__wrapped__"):
        return _decorated(function, _edited(function.__wrapped__, edits))
    definition, first = parsed(function)
    definition.decorator_list, definition.returns = [], None
    for node in ast.walk(definition.args):  # names in there may be known to the class alone, or to type checkers
        if isinstance(node, ast.arg):
            node.annotation = None
    definition.args.defaults = [ast.Constant(None) for _ in definition.args.defaults]
    definition.args.kw_defaults = [default and ast.Constant(None) for default in definition.args.kw_defaults]
    own = {(line + first, column, text): value for names, line, column, text, value in edits if not names}
    numbers = _Numbers(own)
    numbers.visit(definition)
    if own:
        raise ValueError(
            f"{function.__qualname__} no longer reads {', '.join(sorted(text for *_, text in own))}: its source has changed"
        )
    code, scope = function.__code__, dict(function.__globals__)
    for name in dict.fromkeys(names[0] for names, *_ in edits if names):
        scope[name] = _edited(scope[name], [(names[1:], *edit) for names, *edit in edits if names and names[0] == name])
    make = ast.parse(f"def make({', '.join(code.co_freevars)}): return {definition.name}").body[0]
    make.body.insert(0, definition)  # type: ignore[attr-defined]
    exec(compile(ast.fix_missing_locations(ast.Module([make], [])), code.co_filename, "exec"), scope)
    edited = scope.pop("make")(*(cell.cell_contents for cell in function.__closure__ or ()))
    edited.__defaults__, edited.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return edited


def parsed(function: Any) -> tuple[Any, int]:
    """Definition of a function (or of its code), with the lines and columns of its file, and its first line."""
    lines, first = inspect.getsourcelines(function)
    indented = lines[0][:1].isspace()
    tree: Any = ast.parse("if True:\n" * indented + "".join(lines))
    ast.increment_lineno(tree, first - 1 - indented)
    return (tree.body[0].body if indented else tree.body)[0], first


def _decorated(wrapper: Any, inside: Any) -> Any:
    """What a decorator has made of a function, made of another one."""
    cells = getattr(wrapper, "__closure__", None) or ()
    found = [cell.cell_contents is wrapper.__wrapped__ for cell in cells]
    if not any(found):
        raise ValueError(
            f"{wrapper.__qualname__} is decorated by something that does not hold it: its sizes cannot be changed"
        )
    own = tuple(types.CellType(inside) if this else cell for cell, this in zip(cells, found, strict=True))
    copied = types.FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, own)
    copied.__kwdefaults__ = wrapper.__kwdefaults__
    return functools.update_wrapper(copied, inside)


class _Numbers(ast.NodeTransformer):
    """Puts numbers in the place of expressions, and takes those that it found off the list."""

    def __init__(self, edits: dict[tuple[int, int, str], int]) -> None:
        self.edits = edits

    def visit(self, node: Any) -> Any:
        value = self._taken(node)
        if value is None:
            return self.generic_visit(node)
        for part in ast.walk(node):  # `groups` in `channels // groups`: the whole has its number
            self._taken(part)
        return ast.copy_location(ast.Constant(value), node)

    def _taken(self, node: Any) -> int | None:
        at = (getattr(node, "lineno", 0), getattr(node, "col_offset", 0))
        if not isinstance(node, ast.expr) or all(edit[:2] != at for edit in self.edits):
            return None
        return self.edits.pop((*at, ast.unparse(node)), None)


# --- attention whose heads need not fill the embedding ----------------------------------------------------------------


class MultiheadAttention(nn.MultiheadAttention):
    """torch's own with one width in and out, spelt out: heads and embedding may have any number of channels."""

    _qkv_same_embed_dim = property(lambda self: False, lambda self, value: None)  # keeps torch's fused encoder away

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which is missing")
        single, bias = query.dim() == 2, self.in_proj_bias
        inputs: tuple[Tensor, ...] = (query, key, value)
        if single:
            inputs = tuple(x.unsqueeze(0) for x in inputs)
        elif not self.batch_first:
            inputs = tuple(x.transpose(0, 1) for x in inputs)
        if query is key and key is value:
            q, k, v = F.linear(inputs[0], self.in_proj_weight, bias).chunk(3, dim=-1)
        else:
            matrices, biases = self.in_proj_weight.chunk(3), bias.chunk(3) if bias is not None else (None,) * 3
            q, k, v = (F.linear(x, w, b) for x, w, b in zip(inputs, matrices, biases, strict=True))
        q = q.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # [N, heads, L, head_dim]
        k = k.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        v = v.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        mask = _additive(attn_mask, key_padding_mask, q)
        weights: Tensor | None = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), self.dropout, self.training)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if single:
            return out.squeeze(0), weights if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights


def _additive(mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """One mask that is added to the scores [N, heads, L, S]. True in a bool mask means: not looked at."""

    def scores(given: Tensor) -> Tensor:
        return q.new_zeros(given.shape).masked_fill(given, float("-inf")) if given.dtype == torch.bool else given

    total = None
    if mask is not None:
        total = scores(mask.unflatten(0, (len(q), -1)) if mask.dim() == 3 else mask)
    if padding is not None:
        per_key = scores(padding).reshape(-1, 1, 1, padding.shape[-1])
        total = per_key if total is None else total + per_key
    return total


def open_attention_(model: nn.Module) -> nn.Module:
    """Every nn.MultiheadAttention of the plain kind computes the same from now on by code whose sizes are free."""
    for module in model.modules():
        plain = type(module) is nn.MultiheadAttention and module.in_proj_weight is not None
        if plain and module.bias_k is None and not module.add_zero_attn:
            module.__class__ = MultiheadAttention
        if isinstance(
            module, nn.TransformerEncoder
        ):  # padded rows as nested tensors go with torch's own attention only
            module.enable_nested_tensor = module.use_nested_tensor = False
    return model
