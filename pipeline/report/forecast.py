"""How long a run will take, and how many worker-hours: from the rows of its stages and the pace of those that have begun.

A stage's time is rows x forwards of a row x seconds of a worker for a forward / workers. The rows follow from the configuration and the data.
The forwards are counted in multiply-accumulates of the dense network, so that kinds of work compare before they have run, and so that a cut
network costs its part. The seconds are measured in the run itself: for each kind of work in the last stage that did any, and for a kind that
has not run yet in the last stage of all. Starting workers, and stages that read no rows, are foreseen only where an earlier round has shown
how long they take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.report.text import duration, hours

FORWARD, GATES, GRADIENTS, HESSIAN, TRAINING = "forward", "gates", "gradients", "curvature", "training"
FORWARDS = {FORWARD: 1.0, GATES: 2.0, GRADIENTS: 3.0, HESSIAN: 15.0, TRAINING: 3.0}
"""Of a row, by its MACs: a backward costs one forward for the gradients of what layers read, and one for those of the weights, which gates do
without; a product with the Hessian goes backwards through both, twice for two products."""
TEACHER = 1.0
"""What following a teacher adds to a training step: its forward."""


@dataclass(frozen=True)
class Part:
    """Work of one kind in a stage."""

    kind: str
    rows: int
    forwards: float
    """Of one row, in forwards of the dense network."""
    workers: int


@dataclass(frozen=True)
class Work:
    """A stage and what it has to do; without parts where it reads no rows."""

    stage: str
    parts: tuple[Part, ...] = ()

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)


@dataclass(frozen=True)
class Pace:
    """Measured: seconds that one worker takes for a forward of one row, or what costs as much."""

    seconds_per_forward: float
    stage: str


@dataclass(frozen=True)
class First:
    """What was foreseen of a stage before anything could be known of it, or when it had just begun."""

    seconds: float
    made: float
    """Seconds since 1970."""
    share_done: float
    """Of the stage's rows, by then."""
    rows: int
    workers: int


@dataclass(frozen=True)
class Stage:
    """`seconds`: as foreseen now, of the whole stage; those it took where it is done; None where nothing is known."""

    stage: str
    rows: int
    workers: int
    seconds: float | None
    done: bool
    first: First | None = None


@dataclass(frozen=True)
class Total:
    """`seconds` of all stages of which anything is known."""

    seconds: float
    worker_hours: float
    """Of all workers for all the time: they are there, and paid for, also while a stage does without them."""
    cost: float | None
    made: float


@dataclass(frozen=True)
class Forecast:
    stages: tuple[Stage, ...]
    paces: dict[str, Pace] = field(default_factory=dict)
    """By kind of work, in the order in which they were measured."""
    workers: int = 1
    price_per_hour: float | None = None
    total: Total | None = None
    first: Total | None = None

    @property
    def all_read(self) -> bool:
        """Whether no stage is left that reads rows."""
        return all(stage.done for stage in self.stages if stage.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which has no order of keys."""
        return {**asdict(self), "paces": [{"kind": kind, **asdict(pace)} for kind, pace in self.paces.items()]}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Forecast:
        def stage(one: Mapping[str, Any]) -> Stage:
            return Stage(**{**one, "first": First(**one["first"]) if one["first"] else None})

        totals = {name: Total(**stored[name]) if stored[name] else None for name in ("total", "first")}
        return cls(
            tuple(stage(one) for one in stored["stages"]),
            {one["kind"]: Pace(one["seconds_per_forward"], one["stage"]) for one in stored["paces"]},
            stored["workers"],
            stored["price_per_hour"],
            **totals,
        )


def pace_of(paces: Mapping[str, Pace], kind: str) -> Pace | None:
    """That of the kind itself, or the one that was measured last."""
    return paces.get(kind) or next(iter([*paces.values()][::-1]), None)


def seconds_of(work: Work, paces: Mapping[str, Pace]) -> float | None:
    """None for a stage without rows, and as long as nothing was measured."""
    if not work.parts or not paces:
        return None
    total = 0.0
    for part in work.parts:
        pace = pace_of(paces, part.kind)
        assert pace is not None
        total += part.rows * part.forwards * pace.seconds_per_forward / part.workers
    return total


def measured(part: Part, stage: str, rows: float, worker_seconds: float) -> Pace:
    """From rows of a part that are done and the time of the workers that they took, all together."""
    return Pace(worker_seconds / (rows * part.forwards), stage)


def foresee(
    works: Sequence[Work],
    paces: Mapping[str, Pace],
    took: Mapping[str, float],
    *,
    workers: int,
    price_per_hour: float | None,
    now: float,
    shares_done: Mapping[str, float],
    before: Forecast | None,
) -> Forecast:
    """Every stage with what is known of it now, and what was first foreseen of it.

    Args:
        works: all stages, in order.
        took: seconds of those that are done.
        shares_done: part of the rows of a stage that has begun and is not done.
        before: the last forecast of this run, whose first figures stay, unless the work has become another.
    """
    earlier = {stage.stage: stage.first for stage in before.stages if stage.first} if before else {}
    by_name = {name_of(stage): seconds for stage, seconds in took.items()}  # of the last round that had it
    stages = []
    for work in works:
        done = work.stage in took
        seconds = took[work.stage] if done else seconds_of(work, paces)
        if seconds is None and not work.parts:
            seconds = by_name.get(name_of(work.stage))
        num = work.parts[0].workers if work.parts else workers
        first = earlier.get(work.stage)
        if first and not done and (first.rows, first.workers) != (work.rows, num):
            first = None
        if first is None and not done and seconds is not None:
            first = First(seconds, now, shares_done.get(work.stage, 0.0), work.rows, num)
        stages.append(Stage(work.stage, work.rows, num, seconds, done, first))
    total = _total(stages, workers, price_per_hour, now) if paces else None
    return Forecast(
        tuple(stages), dict(paces), workers, price_per_hour, total, (before.first if before else None) or total
    )


def _total(stages: Sequence[Stage], workers: int, price_per_hour: float | None, now: float) -> Total:
    seconds = sum(stage.seconds or 0.0 for stage in stages)
    hours = workers * seconds / 3600
    return Total(seconds, hours, None if price_per_hour is None else hours * price_per_hour, now)


def name_of(stage: str) -> str:
    """`round 2: score` is `score`, as in any other round."""
    return stage.rpartition(": ")[2]


def lines(forecast: Forecast) -> list[str]:
    """For people: the total, the stages that are still to come or running, and where the figures come from."""
    if forecast.total is None:
        return []
    total, left = forecast.total, [one for one in forecast.stages if not one.done]
    cost = "" if total.cost is None else f", costs {total.cost:,.2f}"
    found = [
        f"forecast: {duration(total.seconds)} in all with {forecast.workers} "
        f"{'worker' if forecast.workers == 1 else 'workers'}, {hours(total.worker_hours)} worker-hours{cost}"
    ]
    if known := [f"{one.stage} {duration(one.seconds)}" for one in left if one.seconds is not None]:
        found.append(f"  {', '.join(known)}")
    if unknown := [one.stage for one in left if one.seconds is None]:
        found.append(f"  not foreseen, since they read no rows: {', '.join(unknown)}")
    return [*found, f"  {basis(forecast.paces)}"]


def basis(paces: Mapping[str, Pace]) -> str:
    """Where the figures come from."""
    own = ", ".join(f"{kind} in {pace.stage}" for kind, pace in paces.items())
    others = [f"{kind} {FORWARDS[kind]:g}" for kind in FORWARDS if kind not in paces]
    ratios = f"; others by multiply-accumulates (forwards of a row: {', '.join(others)})" if others else ""
    return f"measured: {own}{ratios}"


def with_pace(paces: Mapping[str, Pace], kind: str, pace: Pace) -> dict[str, Pace]:
    """The same with another one, which now is the last."""
    return {**{name: one for name, one in paces.items() if name != kind}, kind: pace}
