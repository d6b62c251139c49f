"""The command line: `python -m jobs.NAME` runs and resumes, `python -m pipeline status|resume|branch|report|verify|trace` looks and repeats."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence

import tyro
from pydantic import ValidationError
from rich.console import Console

from pipeline import artifacts, config
from pipeline.artifacts import StaleArtifact, StorageError
from pipeline.config import ConfigError, RunConfig
from pipeline.data.batches import BadRowError
from pipeline.data.rows import DataError
from pipeline.execution.drive import PassFailed
from pipeline.execution.train import TrainingFailed
from pipeline.export.artifact import ArtifactError
from pipeline.models import zoo
from pipeline.models.zoo import ModelError
from pipeline.pruning.verify import CutMismatch
from pipeline.report import terminal
from pipeline.report.status import Looker, Place, Status, watch
from pipeline.run import Run
from pipeline.stages import branch, run_all
from pipeline.summary import write_report

EXPECTED = (
    ArithmeticError,
    ArtifactError,
    BadRowError,
    ConfigError,
    CutMismatch,
    DataError,
    ModelError,
    PassFailed,
    StaleArtifact,
    StorageError,
    TrainingFailed,
    ValueError,
)
"""Errors whose message is all that a user needs. Anything else is our mistake and comes with its traceback."""


def run_job(default: RunConfig, description: str | None = None, arguments: Sequence[str] | None = None) -> None:
    """Entry of a job: command line over its defaults, then the whole run. Exits with 2 on an error that the user can mend."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = f"python -m {_module_name()} {shlex.join(arguments)}".strip()
    _or_exit(lambda: execute(parse(default, arguments, description), command))


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else os.path.basename(sys.argv[0])


def parse(default: RunConfig, arguments: Sequence[str], description: str | None = None) -> RunConfig:
    """`--section.field VALUE` over `default`, which `--config FILE.yaml` replaces."""
    arguments = list(arguments)
    if "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise ConfigError("--config needs the path of a YAML file, such as RUN/config.yaml.")
        default = config.load(arguments[at + 1])
        del arguments[at : at + 2]
    default = _one_budget(default, arguments)
    try:
        return tyro.cli(RunConfig, default=default, args=arguments, description=description)
    except ValidationError as error:
        raise ConfigError(config.explain(error)) from None


def _one_budget(default: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """A budget on the command line takes the place of the job's own, also when it is of the other kind."""
    given = {name for name in ("params", "macs") if any(a.split("=")[0] == f"--budget.{name}" for a in arguments)}
    if len(given) == 1:
        other = "macs" if "params" in given else "params"
        return default.model_copy(update={"budget": default.budget.model_copy(update={other: None})})
    return default


def execute(run_config: RunConfig, command: str) -> None:
    """All stages, the report, and the table at the end."""
    run = Run(run_config, command)
    run_all(run)
    summary = write_report(run)
    terminal.print_summary(summary, Console())
    print(f"report: {run.path('report', 'report.html')}")
    print(f"model:  {run.path('model')}")


def _or_exit(work: Callable[[], None]) -> None:
    try:
        work()
    except EXPECTED as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


# --- python -m pipeline ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline", description="Look at runs, go on with them, check them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("status", "stages of a run: what is done, how far the current one is"),
        ("resume", "go on with a run, with the configuration that lies in it"),
        ("report", "write report.html and summary.json anew from what lies in the run"),
        ("verify", "check hashes and compare the cut network with the masked dense one again"),
    ):
        one = commands.add_parser(name, help=text, description=text)
        one.add_argument("run", metavar="RUN", help="run directory")
    text = "look again every so many seconds (5), until the run is finished"
    commands.choices["status"].add_argument("--watch", metavar="SECONDS", type=float, nargs="?", const=5.0, help=text)
    text = "a run with another budget or criterion, on the dense network, graph and statistics of RUN: no new pass over the data"
    branching = commands.add_parser("branch", help=text, description=text)
    branching.add_argument("run", metavar="RUN", help="run directory to begin with")
    branching.add_argument("new", metavar="NEW", help="run directory of the new run; the same command resumes it")
    branching.add_argument(
        "fields", nargs=argparse.REMAINDER, help="fields that differ: --budget.macs 0.4 --score.criterion fisher"
    )
    tracing = commands.add_parser("trace", help="channel groups of a network, and what stays whole")
    tracing.add_argument("model", metavar="MODEL_NAME", help="timm name, or package.module:factory")
    tracing.add_argument("--image-size", type=int, default=224)
    tracing.add_argument("--blocks", action="store_true", help="residual blocks that can go as a whole, too")
    tracing.add_argument("--json", action="store_true", help="the whole graph as JSON")
    options = parser.parse_args(arguments)
    _or_exit(lambda: COMMANDS[options.command](options))


def _stored(run_dir: str) -> RunConfig:
    path = artifacts.join(artifacts.absolute(run_dir), "config.yaml")
    if not artifacts.exists(path):
        raise ConfigError(f"{run_dir} is no run directory: it has no config.yaml.")
    import yaml

    return config.parse({**yaml.safe_load(artifacts.read_bytes(path)), "run_dir": artifacts.absolute(run_dir)})


def _status(options: argparse.Namespace) -> None:
    run, console = Run(_stored(options.run)), Console()
    looker = Looker([Place(one.dir, one.label) for one in run.rounds])
    every_s = vars(options).get("watch")
    if every_s is None:
        terminal.print_status(looker.look(), console)
        return

    def show(status: Status) -> None:
        console.clear()
        terminal.print_status(status, console)

    watch(looker.look, show, every_s)


def _resume(options: argparse.Namespace) -> None:
    execute(_stored(options.run), f"python -m pipeline resume {options.run}")


def _branch(options: argparse.Namespace) -> None:
    stored = _stored(options.run)
    changed = parse(stored.model_copy(update={"run_dir": artifacts.absolute(options.new)}), options.fields)
    branch(Run(stored), Run(changed))
    execute(changed, f"python -m pipeline branch {shlex.join([options.run, options.new, *options.fields])}")


def _report(options: argparse.Namespace) -> None:
    run = Run(_stored(options.run), f"python -m pipeline report {options.run}")
    terminal.print_summary(write_report(run), Console())
    print(f"report: {run.path('report', 'report.html')}")


def _verify(options: argparse.Namespace) -> None:
    from pipeline.checks import check_run

    for line in check_run(Run(_stored(options.run))):
        print(line)


def _trace(options: argparse.Namespace) -> None:
    import torch

    from pipeline.models.costs import count
    from pipeline.pruning.trials import trace

    model = zoo.build(options.model)
    graph = trace(model, torch.zeros(1, 3, options.image_size, options.image_size), blocks=options.blocks)
    if options.json:
        print(json.dumps(json.loads(graph.to_json()), indent=1))
    else:
        terminal.print_graph(options.model, graph, count(graph, {}), Console())


COMMANDS = {
    "status": _status,
    "resume": _resume,
    "branch": _branch,
    "report": _report,
    "verify": _verify,
    "trace": _trace,
}
