"""What the tracer covers, on a zoo of real architectures, beside Torch-Pruning: `python -m benchmarks.zoo [--only NAME ...]`.

cut        groups were found, a random half of their channels or so was really removed, and everything that follows works: forward, backward,
           outputs equal to those of the masked dense network; ours also: saved, loaded without this package, the same outputs again
refused    nothing can be cut, or the tracer says that it cannot trace this network; with the reason
mismatch   the smaller network computes something else, and nothing said so
error      a step raised something else
time-out   a step took longer than it may

Each architecture runs in a process of its own, on one thread, once for each side. What has finished is appended to a file of JSON lines at
once; the same command goes on where it was interrupted. Networks have random weights: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.zoo_list import architectures

HERE = Path(__file__).parent
SIDES = {"ours": {}, "torch-pruning": {"TIMM_FUSED_ATTN": "0"}}
"""Side -> its environment."""
STATUSES = ("cut", "refused", "mismatch", "error", "time-out")
GRACE_S = 30.0
"""A tracer with a time limit of its own may round it off; one without is stopped this much later."""
COMMAND = "from benchmarks.zoo_one import main; main()"

Result = dict[str, Any]


# --- running ----------------------------------------------------------------------------------------------------------


def run_one(name: str, side: str, options: argparse.Namespace) -> Result:
    """The record of one architecture; its process is stopped when a step takes too long or the memory too much."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        path, errors = Path(folder, "record.json"), Path(folder, "stderr")
        command = [sys.executable, "-c", COMMAND, side, name, "--record", str(path), "--timeout", str(options.timeout)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": folder, **SIDES[side]}
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                command,
                cwd=HERE.parent,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                stopped = _watch(process, path, options)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        result = _read(path)
        if stopped:
            result.update(stopped)
        elif "status" not in result:
            last = (errors.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
            reason = f"{result.get('step', 'start')}: ended with code {process.returncode}, {last[:200]}"
            result.update(status="error", reason=reason)
    return {
        "name": name,
        "side": side,
        **result,
        "total_s": time.perf_counter() - started,
        "versions": {package: version(package) for package in ("torch", "timm", "torchvision", "torch-pruning")},
        "commit": _commit(),
    }


def _watch(process: subprocess.Popen[bytes], path: Path, options: argparse.Namespace) -> Result | None:
    """Wait for the process; the status if it has to be stopped."""
    step, since = "", time.perf_counter()
    while process.poll() is None:
        time.sleep(0.1)
        now = _read(path).get("step", "start")
        if now != step:
            step, since = now, time.perf_counter()
        limit_s = options.timeout + GRACE_S if step == "trace" else options.step_timeout
        if time.perf_counter() - since > limit_s:
            return {"status": "time-out", "reason": f"{step}: more than {limit_s:.0f} s"}
        if _resident_gb(process.pid) > options.memory_gb:
            return {"status": "error", "reason": f"{step}: more than {options.memory_gb:g} GB of memory"}
    return None


def _resident_gb(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0  # it has just ended
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def _read(path: Path) -> Result:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _commit() -> str:
    """Of the working tree, "+" if files of the package differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "pipeline") else "")


def run_all(names: Iterable[str], sides: Iterable[str], lines: Path, options: argparse.Namespace) -> None:
    """Everything that has no line yet, or one with a status to run again; each result is appended as it comes."""
    done = {(result["name"], result["side"]) for result in read_lines(lines) if result["status"] not in options.again}
    todo = [(name, side) for name in names for side in sides if (name, side) not in done]
    with ThreadPoolExecutor(options.jobs) as pool, lines.open("a") as file:
        running = {pool.submit(run_one, name, side, options): (name, side) for name, side in todo}
        for number, future in enumerate(as_completed(running), 1):
            result = future.result()
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(f"[{number}/{len(todo)}] {_progress(result)}", flush=True)


def _progress(result: Result) -> str:
    share = f"{result['share']:.1%}" if "share" in result else "-"
    text = f"{result['name']} {result['side']}: {result['status']}, {share}, {result['total_s']:.0f} s"
    return f"{text}  {result['reason']}" if result["reason"] else text


def read_lines(path: Path) -> list[Result]:
    """Finished results, the last of each architecture and side; a line that an interruption cut off is dropped from the file."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    results = [json.loads(line) for line in whole.splitlines()]
    return list({(result["name"], result["side"]): result for result in results}.values())


# --- the summary ------------------------------------------------------------------------------------------------------


def figures(results: list[Result]) -> dict[str, Any]:
    """Of one side: architectures by status; of those that were cut, shares; of those that were traced, time and memory."""
    cut = [result for result in results if result["status"] == "cut"]
    shares, traces = (
        [result["share"] for result in cut],
        [result["trace_s"] for result in results if "trace_s" in result],
    )
    memory = [result["trace_extra_mb"] for result in results if "trace_extra_mb" in result]
    return {
        "architectures": len(results),
        **{status: sum(result["status"] == status for result in results) for status in STATUSES},
        "cut_not_comparable": sum("equality" in result for result in cut),
        "median_share": median(shares) if shares else None,
        "share_of_99_percent": sum(share >= 0.99 for share in shares) / len(results) if results else None,
        "median_trace_s": median(traces) if traces else None,
        "max_trace_s": max(traces, default=None),
        "median_trace_extra_mb": median(memory) if memory else None,
        "max_trace_extra_mb": max(memory, default=None),
    }


LABELS = {
    "architectures": ("architectures", "{:,}"),
    **{status: (status, "{:,}") for status in STATUSES},
    "cut_not_comparable": ("cut, but equality is not defined", "{:,}"),
    "median_share": ("parameters in groups, median of the cut", "{:.1%}"),
    "share_of_99_percent": ("cut, with at least 99 % of the parameters in groups", "{:.1%}"),
    "median_trace_s": ("seconds of the trace, median", "{:.2f}"),
    "max_trace_s": ("seconds of the trace, most", "{:.1f}"),
    "median_trace_extra_mb": ("extra memory of the trace, median MB", "{:,.0f}"),
    "max_trace_extra_mb": ("extra memory of the trace, most MB", "{:,.0f}"),
}


def summary(results: list[Result]) -> dict[str, dict[str, Any]]:
    """Figures of each side, over all and over timm and torchvision alone."""
    found = {}
    for side in SIDES:
        of_side = [result for result in results if result["side"] == side]
        torchvision = [result for result in of_side if result["name"].startswith("torchvision.")]
        timm = [result for result in of_side if not result["name"].startswith("torchvision.")]
        for name, some in ((side, of_side), (f"{side}, timm", timm), (f"{side}, torchvision", torchvision)):
            if some:
                found[name] = figures(some)
    return found


def summary_table(results: list[Result]) -> str:
    columns = summary(results)
    rows = [
        [label, *("-" if column[key] is None else form.format(column[key]) for column in columns.values())]
        for key, (label, form) in LABELS.items()
    ]
    return table(["", *columns], rows)


def full_table(results: list[Result]) -> str:
    """A line for each architecture."""
    by_key = {(result["name"], result["side"]): result for result in results}
    rows = []
    for name in dict.fromkeys(result["name"] for result in results):
        sides = [by_key.get((name, side)) for side in SIDES]
        known = next(result for result in sides if result)
        params = f"{known['num_params'] / 1e6:.1f}" if "num_params" in known else "-"
        cells = [cell for result in sides for cell in _cells(result)]
        rows.append([name, params, str(known.get("size", "-")), *cells])
    head = ["status", "share", "trace s", "MB", "why"]
    return table(["architecture", "M params", "px", *head, *(f"TP {word}" for word in head)], rows)


def _cells(result: Result | None) -> list[str]:
    if result is None:
        return ["not run", "", "", "", ""]
    forms = {"share": "{:.1%}", "trace_s": "{:.1f}", "trace_extra_mb": "{:,.0f}"}
    numbers = [form.format(result[key]) if key in result else "" for key, form in forms.items()]
    why = result["reason"] or result.get("equality", "")
    return [result["status"], *numbers, why[:160].replace("|", "\\|")]


def reasons_table(results: list[Result]) -> str:
    """All reasons for which ours leaves channels whole, numbers as #, the most frequent first."""
    entries: dict[str, int] = {}
    networks: dict[str, int] = {}
    for result in results:
        for reason, count in result.get("frozen_reasons", {}).items():
            entries[reason] = entries.get(reason, 0) + count
            networks[reason] = networks.get(reason, 0) + 1
    ordered = sorted(entries, key=lambda reason: (-networks[reason], -entries[reason], reason))
    rows = [[str(networks[r]), str(entries[r]), r.replace("|", "\\|")] for r in ordered]
    return table(["architectures", "entries", "reason"], rows)


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines: Iterator[list[str]] = iter([head, ["---"] * len(head), *rows])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_summary(results: list[Result], path: Path) -> None:
    """Figures and results as JSON under `path`, tables as Markdown beside it; the summary on the terminal."""
    document = {"summary": summary(results), "results": results}
    path.write_text(json.dumps(document, indent=1) + "\n")
    parts = [
        "# Architectures",
        summary_table(results),
        "## Each",
        full_table(results),
        "## Frozen",
        reasons_table(results),
    ]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    print(summary_table(results))


# --- the command ------------------------------------------------------------------------------------------------------


def selected(only: list[str] | None) -> list[str]:
    """Names of the list; a bare name also means torchvision's."""
    names = list(architectures())
    if only is None:
        return names
    if unknown := [word for word in only if not any(word in (name, name.split(":")[-1]) for name in names)]:
        raise SystemExit(f"not in the list: {', '.join(unknown)}. Show it with --list.")
    return [name for name in names if {name, name.split(":")[-1]} & set(only)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--json", type=Path, default=HERE / "zoo.json", help="results; beside it .jsonl and .md")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that a trace may take")
    parser.add_argument("--step-timeout", type=float, default=600.0, help="seconds that any other step may take")
    parser.add_argument("--memory-gb", type=float, default=16.0, help="resident memory that a process may have")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="Torch-Pruning, too")
    parser.add_argument("--again", nargs="+", choices=STATUSES, default=[], help="run what ended like this again")
    parser.add_argument("--summary", type=Path, metavar="JSONL", help="write the tables from these lines, run nothing")
    parser.add_argument("--list", action="store_true", help="print the architectures, run nothing")
    options = parser.parse_args()
    if options.list:
        print("\n".join(architectures()))
        return
    if options.summary:
        write_summary(read_lines(options.summary), options.summary.with_suffix(".json"))
        return
    lines = options.json.with_suffix(".jsonl")
    run_all(selected(options.only), ["ours", "torch-pruning"] if options.peer else ["ours"], lines, options)
    write_summary(read_lines(lines), options.json)


if __name__ == "__main__":
    main()
