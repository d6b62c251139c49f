"""How far a run is, from its storage alone: no cluster, no data, any machine that sees the run directory.

What is read is little: manifests, the headers of the running stage's commits (each once, however often one looks), the history of its
training, and the forecast.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pyarrow import fs as arrow_fs

from pipeline import artifacts
from pipeline.artifacts import Manifest, StageRecord
from pipeline.execution.ledger import READERS, StoredCommit, TornCommit, accept
from pipeline.execution.train import read_history
from pipeline.report.forecast import Forecast
from pipeline.report.text import duration, rate

SILENT_AFTER_S = 300.0
"""Without any sign of life: a driver gives one every 20 s, whatever it does."""
RECENT_RECORDS = 10
"""Of a training, by which its speed is judged."""


@dataclass(frozen=True)
class Place:
    """Where a round has its stages, and what they are called among those of the whole run."""

    directory: str
    label: Callable[[str], str]


@dataclass(frozen=True)
class StageStatus:
    stage: str
    state: str
    """`done`, `running`, `silent` (says it runs, and shows no sign of life), or `to come`."""
    started: float | None = None
    seconds: float | None = None
    """Of the last start; of one that runs, until now."""
    attempts: int = 0
    how_far: str = ""
    seconds_left: float | None = None
    """As its own speed tells, or, before it has one, the forecast."""
    sign_age_s: float | None = None
    """Since the last sign of life."""
    driver: str = ""


@dataclass(frozen=True)
class Status:
    stages: tuple[StageStatus, ...]
    finished: bool
    """Whether there is nothing to wait for."""
    idle_s: float | None = None
    """Since the last stage ended, where none is running and not all are done."""

    @property
    def seconds_left(self) -> float | None:
        """Of all stages of which it is known."""
        known = [stage.seconds_left for stage in self.stages if stage.seconds_left is not None]
        return sum(known) if known else None


class Looker:
    """Looks at a run again and again.

    Args:
        places: of the rounds, the whole run's last, which has the forecast.
    """

    def __init__(self, places: Sequence[Place], clock: Callable[[], float] = time.time) -> None:
        self._places, self._clock = places, clock
        self._commits: dict[str, StoredCommit | None] = {}

    def look(self) -> Status:
        now = self._clock()
        path = artifacts.join(self._places[-1].directory, "forecast.json")
        forecast = Forecast.from_dict(artifacts.read_json(path)) if artifacts.exists(path) else None
        foreseen = {stage.stage: stage for stage in forecast.stages} if forecast else {}
        stages = []
        for place in self._places:
            records = Manifest(place.directory).stages
            for name, record in sorted(records.items(), key=lambda item: item[1].started):
                label = place.label(name)
                rows = foreseen[label].rows if label in foreseen else None
                expected = foreseen[label].seconds if label in foreseen else None
                stages.append(self._stage(place.directory, name, label, record, rows, expected, now))
        begun = {stage.stage for stage in stages}
        to_come = [one for one in foreseen.values() if one.stage not in begun]
        all_done = all(stage.state == "done" for stage in stages)
        # Without a forecast the last stage of every run tells that the others were.
        finished = all_done and not to_come and (forecast is not None or self._places[-1].label("export") in begun)
        ended = max(((one.started or 0.0) + (one.seconds or 0.0) for one in stages), default=None)
        idle_s = now - ended if ended is not None and all_done and not finished else None
        stages += [StageStatus(one.stage, "to come", seconds_left=one.seconds) for one in to_come]
        return Status(tuple(stages), finished, idle_s)

    def _stage(
        self,
        directory: str,
        name: str,
        label: str,
        record: StageRecord,
        rows: int | None,
        expected_s: float | None,
        now: float,
    ) -> StageStatus:
        if record.state == "done":
            return StageStatus(label, "done", record.started, record.seconds, record.attempts)
        beat = _read(artifacts.join(directory, "alive.json"))
        key = f"{name}-{artifacts.short(record.fingerprint)}"
        units, training = (artifacts.join(directory, kind, key) for kind in ("units", "checkpoints"))
        commits = {file: about for file, about in modified(units).items() if file.startswith("commit-")}
        trained = modified(training)
        written = [when for _, when in (*commits.values(), *trained.values())]
        age = max(0.0, now - max([record.started, beat.get("time", 0.0), *written]))
        how_far, left = "", None
        if commits:
            how_far, left = self._pass(units, commits, record)
        elif trained:
            how_far, left = _training(training, record, rows)
        if left is None and expected_s is not None:
            left = max(0.0, expected_s - (now - record.started))
        here = beat.get("time", 0.0) >= record.started
        return StageStatus(
            label,
            "silent" if age > SILENT_AFTER_S else "running",
            record.started,
            now - record.started,
            record.attempts,
            how_far,
            left,
            age,
            f"{beat['host']}, process {beat['pid']}" if here else "",
        )

    def _pass(
        self, directory: str, files: Mapping[str, tuple[int, float]], record: StageRecord
    ) -> tuple[str, float | None]:
        """Units that count, by the headers of the commits, and the time that the others will take at the speed of this start."""
        commits = self._headers(directory, files, record.fingerprint)
        about = record.inputs.get("units") or record.inputs.get("calibrate") or {}
        num_units = int(about.get("num_units", 0))
        if not num_units:
            return f"{len(commits)} commits", None
        reading = accept(commits, num_units)
        done = int(reading.covered.sum())
        worked_s = max(when for _, when in files.values()) - record.started
        fresh = accept([commit for commit in commits if files[commit.name][1] >= record.started], num_units)
        per_s = int(fresh.covered.sum()) / worked_s if worked_s > 0 else 0.0
        most = " at most" if record.inputs.get("sample") else ""
        skipped = f", {len(reading.bad_rows):,} rows skipped" if reading.bad_rows else ""
        speed = f", {rate(per_s * reading.rows / done)}" if per_s and done else ""
        text = f"{done:,} of {num_units:,} units{most} ({100 * done / num_units:.0f} %) in {reading.commits:,} commits{speed}{skipped}"
        return text, (num_units - done) / per_s if per_s else None

    def _headers(self, directory: str, files: Mapping[str, tuple[int, float]], fingerprint: str) -> list[StoredCommit]:
        """In the order of their names; those that are not whole, or of something else, left out."""

        def read(name: str) -> StoredCommit | None:
            try:
                return StoredCommit.open(artifacts.join(directory, name), name, files[name][0])
            except (TornCommit, OSError):
                return None

        paths = {name: artifacts.join(directory, name) for name in files}
        new = [name for name, path in paths.items() if path not in self._commits]
        with ThreadPoolExecutor(READERS) as readers:
            for name, found in zip(new, readers.map(read, new), strict=True):
                self._commits[paths[name]] = found
        known = [self._commits[paths[name]] for name in sorted(files)]
        return [commit for commit in known if commit is not None and commit.fingerprint == fingerprint]


def _training(directory: str, record: StageRecord, rows: int | None) -> tuple[str, float | None]:
    history = read_history(directory)
    if not history:
        return "", None
    last, recent = history[-1], history[-1 - RECENT_RECORDS :]
    rows_done = last["step"] * record.inputs["batch_size"]
    of = f" of {rows // record.inputs['batch_size']:,}" if rows else ""
    since = last["seconds"] - recent[0]["seconds"]
    per_s = sum(one["rows"] for one in recent[1:]) / since if since else last["rows_per_s"]
    zeros = f", {100 * last['zeros']:.1f} % zero" if "zeros" in last else ""
    text = f"step {last['step']:,}{of}, loss {last['loss']:.4g}{zeros}, {rate(last['rows_per_s'])}"
    return text, max(0, rows - rows_done) / per_s if rows and per_s else None


def _read(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(artifacts.read_bytes(path)) if artifacts.exists(path) else {}
    return found


def modified(directory: str) -> dict[str, tuple[int, float]]:
    """Size in bytes and time of the last change of each file, by name; unfinished ones are not listed. A missing directory is empty."""
    found: dict[str, tuple[int, float]] = {}
    if artifacts.is_uri(directory):
        with artifacts.storage(directory) as (filesystem, inner):
            infos = filesystem.get_file_info(arrow_fs.FileSelector(inner, allow_not_found=True))
        found = {info.base_name: (int(info.size or 0), (info.mtime_ns or 0) / 1e9) for info in infos if info.is_file}
    elif os.path.isdir(directory):
        with os.scandir(directory) as entries:
            for entry in entries:
                try:
                    about = entry.stat()
                except FileNotFoundError:  # a temporary file that was renamed meanwhile
                    continue
                found[entry.name] = (about.st_size, about.st_mtime)
    return {name: about for name, about in found.items() if not name.startswith(".")}


def sentences(status: Status) -> list[str]:
    """What the table leaves open: whether somebody works, and how long it will take."""
    if not status.stages:
        return ["No stage has begun."]
    found = []
    for one in status.stages:
        where = f" ({one.driver})" if one.driver else ""
        signs = {
            "running": f"last sign of life {duration(one.sign_age_s)} ago{where}",
            "silent": f"no sign of life for {duration(one.sign_age_s)}{where}; the same command resumes",
        }
        if one.state in signs:
            found.append(f"{one.stage}: {'; '.join(filter(None, (one.how_far, signs[one.state])))}.")
    if status.idle_s is not None and status.idle_s > SILENT_AFTER_S:
        found.append(f"No stage has begun for {duration(status.idle_s)}; the same command resumes.")
    if status.finished:
        found.append("Everything is done.")
    elif status.seconds_left is not None:
        open_ended = any(one.seconds_left is None and one.state != "done" for one in status.stages)
        found.append(f"{'At least a' if open_ended else 'A'}bout {duration(status.seconds_left)} left.")
    return found


def watch(
    look: Callable[[], Status],
    show: Callable[[Status], None],
    every_s: float,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Look and show again, until the run is finished."""
    while True:
        status = look()
        show(status)
        if status.finished:
            return
        sleep(every_s)
