"""The table of rules: what happens to labels in each ATen operation, registered under the operation's name.

An operation without a rule is a barrier: the channels that reach it stay whole, with the operation, the module and the
line as the reason. It is never taken for elementwise. Operations that torch itself tags as pointwise need no entry. For
an operation of your own, register a rule before you trace:

    @rule("mylib::scale", kind="join")
    def scale(trace, call):
        trace.put(call.outputs[0], trace.join(call, [call["x"], call["factor"]]))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from pipeline.models.trace.tracer import Trace


Resize = Callable[[dict[str, Any]], dict[str, Any]]


class Call:
    """One operation as it ran: arguments by their name in the schema, and the tensors that came out."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name: str = func._schema.name
        """Without overload; an in-place operation goes by the rule of the other, so its "_" is gone."""
        self.outputs = list(tensors_in(out))

    @cached_property
    def bound(self) -> dict[str, Any]:
        parameters = self.func._schema.arguments
        bound = {p.name: p.default_value for p in parameters if p.has_default_value()}
        bound.update(zip((p.name for p in parameters), self.args, strict=False))
        return {**bound, **self.kwargs}

    def __getitem__(self, argument: str) -> Any:
        return self.bound[argument]

    def get(self, argument: str, default: Any = None) -> Any:
        """The argument, or `default` where the operation's schema has none of that name."""
        return self.bound.get(argument, default)

    def arguments(self, bound: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments for another call of the same operation."""
        schema = self.func._schema.arguments
        positional = [bound[p.name] for p in schema if not p.kwarg_only and p.name in bound]
        return positional, {p.name: bound[p.name] for p in schema if p.kwarg_only and p.name in bound}

    @property
    def tensors(self) -> list[Tensor]:
        return list(tensors_in((self.args, self.kwargs)))

    @property
    def mutated(self) -> list[Tensor]:
        """Arguments that the operation writes into."""
        written = [p.name for p in self.func._schema.arguments if p.alias_info is not None and p.alias_info.is_write]
        return list(tensors_in([self.get(name) for name in written]))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings and objects with attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from tensors_in(list(vars(value).values()))


@dataclass(frozen=True, slots=True)
class Rule:
    apply: Callable[[Trace, Call], None]
    kind: str
    """join, move, tie, window, statistic, norm, contract, barrier or refuse. A contraction reads zeros where channels were
    removed; every other operation that mixes channels says so with Trace.mix and sees only those that are kept."""
    resize: Resize | None = None
    """Brings arguments that state the number of channels up to date with the tensors, which lack the removed ones."""


RULES: dict[str, Rule] = {}
"""ATen name without overload -> rule."""


def rule(
    *names: str, kind: str, resize: Resize | None = None
) -> Callable[[Callable[[Trace, Call], None]], Callable[[Trace, Call], None]]:
    """Register a function for operations "namespace::name". A later registration replaces an earlier one."""

    def register(apply: Callable[[Trace, Call], None]) -> Callable[[Trace, Call], None]:
        RULES.update({name: Rule(apply, kind, resize) for name in names})
        return apply

    return register


def find(name: str) -> tuple[str, Rule | None]:
    """The name under which an operation has a rule, and the rule; one in place goes by that of the other."""
    name = name if name in RULES else name.removesuffix("_")
    return name, RULES.get(name)
