"""The model card of an artifact: what it is, how to rebuild it, what it costs, what it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def render(spec: Mapping[str, Any], *, name: str) -> str:
    """Markdown from what architecture.json says; `name` is the artifact's directory."""
    dense, pruned = spec["costs"]["dense"], spec["costs"]["pruned"]
    rows = [
        f"| {what} | {dense[key]:,} | {pruned[key]:,} | {_percent(pruned[key], dense[key])} |"
        for key, what in (("params", "parameters"), ("macs", "MACs per row"))
    ]
    plan = spec["plan"]
    return "\n".join(
        [
            f"# {name}: {spec['factory']}, pruned",
            "",
            "Rebuild it in three lines; nothing is downloaded and nothing is unpickled:",
            "",
            "```python",
            "import pipeline",
            f'model = pipeline.load("{name}")  # an nn.Module on the CPU, in eval mode',
            f"logits = model(images)  # float32 {_input(spec)}",
            "```",
            "",
            "Without this package (torch, safetensors and the factory's package suffice), from inside this directory:",
            "`from load import load; model = load()`.",
            "",
            "| | dense | pruned | remains |",
            "|---|---:|---:|---:|",
            *rows,
            "",
            _size(spec),
            "",
            f"- factory: `{spec['factory']}` with `{json.dumps(spec['factory_kwargs'])}`",
            *[f"- {key}: {_value(value)}" for key, value in spec["normalisation"].items()],
            f"- plan: `{plan['sha256']}`; criterion {plan['criterion'] or 'not named'}, "
            f"scope {plan['scope'] or 'not named'}, budget {json.dumps(plan['budget'])}",
            f"- made with {', '.join(f'{package} {version}' for package, version in spec['versions'].items())}",
            *[f"- {key}: {_value(value)}" for key, value in spec["extra"].items()],
            "",
        ]
    )


def _size(spec: Mapping[str, Any]) -> str:
    stored, dense, count = spec["bytes"]["stored"], spec["bytes"]["dense"], len(spec["sparse"])
    if not count:
        return f"The weights take {stored:,} bytes."
    apart = "1 tensor is stored without its zeros" if count == 1 else f"{count} tensors are stored without their zeros"
    return (
        f"The weights take {stored:,} bytes instead of {dense:,}: {apart}. Loading restores every bit. Such zeros make the "
        "file smaller; a dense runtime gains no time from them."
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _input(spec: Mapping[str, Any]) -> str:
    size = spec["input_size"]
    return f"[N, {', '.join(str(n) for n in size)}]" if size else "[N, ...]"


def _value(value: Any) -> str:
    return f"{value:,.6g}" if isinstance(value, float) else str(value) if isinstance(value, str) else json.dumps(value)
