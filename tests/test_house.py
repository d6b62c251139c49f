"""The house stands: imports point one way, only execution/ knows Ray, numbers know no files."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / "pipeline"
ROOMS = [
    "config",
    "artifacts",
    "data",
    "models",
    "saliency",
    "pruning",
    "training",
    "execution",
    "report",
    "export",
    "run",
    "stages",
    "checks",
    "summary",
    "cli",
]
SAME_FLOOR = {"config": 0, "artifacts": 0, "report": 1, "export": 1}


def _imports(path: Path) -> set[str]:
    """Rooms of the package and foreign packages that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = [path for path in sorted(ROOT.rglob("*.py")) if _room(path) not in {"__init__", "__main__"}]


def test_every_file_belongs_to_a_room():
    assert {_room(path) for path in FILES} <= set(ROOMS)


def test_imports_point_one_way():
    wrong = []
    for path in FILES:
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] == "pipeline" and len(parts) > 1 and parts[1] in ROOMS:
                here, there = _room(path), parts[1]
                same_floor = here in SAME_FLOOR and there in SAME_FLOOR and SAME_FLOOR[here] == SAME_FLOOR[there]
                if ROOMS.index(there) > ROOMS.index(here) or (same_floor and here != there):
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_only_execution_imports_ray():
    wrong = [
        str(p.relative_to(ROOT))
        for p in FILES
        for n in _imports(p)
        if n.split(".")[0] == "ray" and _room(p) != "execution"
    ]
    assert wrong == []


def test_numbers_know_no_files():
    forbidden = {"pipeline.artifacts", "pyarrow", "os", "pathlib"}
    numbers = [p for p in FILES if _room(p) == "saliency"]
    assert [f"{p.name}: {n}" for p in numbers for n in _imports(p) if n in forbidden] == []
