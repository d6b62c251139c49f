"""Every benchmark, each in a process of its own: `python -m benchmarks --data ROWS.parquet [--only decode commits]`.

Writes benchmarks/results.json, and from it the table in benchmarks/README.md. What is not run keeps its last result. Ratios are what
counts: both sides were measured in turns in one process, on the same rows and with the same threads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Job:
    """A benchmark as it is run."""

    module: str
    options: tuple[str, ...] = ()
    reads_rows: bool = False


JOBS = {
    "scoring-resnet50": Job("scoring", ("--model", "resnet50")),
    "scoring-resnet152": Job("scoring", ("--model", "resnet152", "--turns", "2")),
    "stage": Job("stage", ("--rows", "2560"), reads_rows=True),
    "peers": Job("peers", reads_rows=True),
    "selection": Job("selection"),
    "decode": Job("decode", reads_rows=True),
    "memory": Job("memory", reads_rows=True),
    "scale": Job("scale"),
    "commits": Job("commits"),
    "recovery": Job("recovery", reads_rows=True),
    "startup": Job("startup"),
    "sharding": Job("sharding"),
    "allocation": Job("allocation"),
}


@dataclass(frozen=True)
class Line:
    """A line of the table: a figure of a result and what it should be."""

    what: str
    peer: str
    job: str
    figure: Callable[[dict[str, Any]], float]
    goal: float
    at_least: bool = False
    unit: str = "x"

    def cells(self, results: dict[str, Any], told: dict[str, list[str]]) -> list[str]:
        """`told`: the lines of the last table, by their first cell."""
        if self.job not in results:
            return told.get(self.what, [self.what, self.peer, self._goal(), "not run", ""])
        value = self.figure(results[self.job])
        met = value >= self.goal if self.at_least else value <= self.goal
        by = abs(value - self.goal)
        verdict = "met" if met else f"missed by {self._number(by)}"
        return [self.what, self.peer, self._goal(), f"**{self._number(value)} {self.unit}**", verdict]

    def _goal(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self._number(self.goal)} {self.unit}"

    @staticmethod
    def _number(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _units_per_s(result: dict[str, Any]) -> float:
    """Handed out by the coordinator and written to disk, one after the other on one core."""
    troubled = result["troubled_pass"]
    write_s = troubled["commits"] * troubled["write_ms"] / 1e3
    return float(result["units"] / (result["units"] / troubled["coordinator_units_per_s"] + write_s))


def _last_restart(result: dict[str, Any]) -> dict[str, float]:
    return dict(result["troubled_pass"]["restarts"]["at the end"])


PLAIN = "forward + backward with weight gradients, 224 px"
LINES = [
    Line("channel-gate scoring, ResNet-50", PLAIN, "scoring-resnet50", lambda r: r["gates_ratio"], 0.80),
    Line("channel-gate scoring, ResNet-152", PLAIN, "scoring-resnet152", lambda r: r["gates_ratio"], 0.80),
    Line("gates and weight statistics, ResNet-50", PLAIN, "scoring-resnet50", lambda r: r["weights_ratio"], 1.10),
    Line("gates and weight statistics, ResNet-152", PLAIN, "scoring-resnet152", lambda r: r["weights_ratio"], 1.10),
    Line("the stage through Ray, rows/s", "bare PyTorch loop", "stage", lambda r: r["ratio_to_bare"], 0.95, True),
    Line("two workers, rows/s", "one worker", "stage", lambda r: r["ratio_of_two_workers"], 1.85, True),
    Line(
        "recovery by two workers through Ray Train, rows/s",
        "the same loop in one process of two threads",
        "recovery",
        lambda r: r["ratio_to_plain"],
        0.95,
        True,
    ),
    Line("five criteria, rows/s", "Torch-Pruning: Taylor, then OBD-C", "peers", lambda r: r["speed_ratio"], 3.0, True),
    Line(
        "global masks of 1e8 scores, speed",
        "torch global_unstructured",
        "selection",
        lambda r: r["masks"]["speed_ratio"],
        10.0,
        True,
    ),
    Line(
        "the same, extra memory", "torch global_unstructured", "selection", lambda r: r["masks"]["memory_ratio"], 0.10
    ),
    Line(
        "threshold of 1e9 scores, extra memory", "-", "selection", lambda r: r["billion"]["extra_mb"], 300.0, unit="MB"
    ),
    Line(
        "JPEG decode + transform, stored 224 px, rows/s",
        "timm + DataLoader",
        "decode",
        lambda r: r["stored"]["speed_ratio_timm"],
        1.2,
        True,
    ),
    Line("the same, 500 x 375", "timm + DataLoader", "decode", lambda r: r["large"]["speed_ratio_timm"], 1.2, True),
    Line(
        "CPU time of a forward, EfficientNet-Lite0, as workers have it, speed",
        "malloc's own settings",
        "allocation",
        lambda r: r["speed_ratio"],
        1.5,
        True,
    ),
    Line(
        "training by two workers that share a network: memory of each",
        "two that hold it whole",
        "sharding",
        lambda r: r["training"]["ratio"],
        0.6,
    ),
    Line(
        "scoring of every weight by a team of two: memory of each",
        "a worker that holds it whole",
        "sharding",
        lambda r: r["scoring"]["ratio"],
        0.6,
    ),
    Line(
        "plan and cut of a stored network: memory of the driver",
        "the weights that stay",
        "sharding",
        lambda r: r["cutting"]["ratio"],
        1.2,
    ),
    Line("peak memory, 100x the rows", "1x the rows", "memory", lambda r: r["largest_over_smallest"], 1.05),
    Line("1.6 M units and 512 workers: coordinator and commits", "-", "scale", _units_per_s, 2000.0, True, "units/s"),
    Line("the same: restart from disk", "-", "scale", lambda r: _last_restart(r)["seconds"], 10.0, unit="s"),
    Line("the same: memory of the restart", "-", "scale", lambda r: _last_restart(r)["peak_mb"], 1000.0, unit="MB"),
    Line("a commit of 60 M weight statistics, MB/s", "raw write", "commits", lambda r: r["ratio"], 0.7, True),
]


def run(name: str, data: str | None) -> dict[str, Any]:
    job = JOBS[name]
    command = [sys.executable, "-m", f"benchmarks.{job.module}", *job.options]
    if job.reads_rows and data:
        command += ["--data", data]
    print(f"{name}: {' '.join(command[1:])}", flush=True)
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output[output.index("{") :]))


def table(results: dict[str, Any], before: str) -> str:
    told = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in before.splitlines() if line]
    kept = {cells[0]: [*cells, ""][:5] for cells in told}
    head = ["what", "peer", "goal", "measured", ""]
    rows = [head, ["---"] * len(head), *(line.cells(results, kept) for line in LINES)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def machine() -> str:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, no GPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="Parquet file of images in Hugging Face's layout; without it, made-up JPEGs")
    parser.add_argument("--only", nargs="+", choices=list(JOBS), default=list(JOBS), metavar="NAME")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.only:
        results[name] = {**run(name, options.data), "machine": machine()}
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    readme = HERE / "README.md"
    text = readme.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    lines = table(results, text[start:end])
    readme.write_text(f"{text[:start]}\n{lines}\n{text[end:]}")
    print(lines)


if __name__ == "__main__":
    main()
