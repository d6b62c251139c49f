"""The artifact of a network without some of its residual blocks comes back alone, in a process that knows nothing of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.export.artifact import ArtifactError, load, save
from pipeline.models.standalone import Removed
from pipeline.pruning.plan import planned
from pipeline.pruning.surgery import cut
from pipeline.pruning.trials import random_subsets, trace
from tests.residual import IMAGE, resnet

ROOT = Path(__file__).parent.parent.parent
RESNET = "tests.residual:resnet"
REMOVED = ["blocks.0", "blocks.3"]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    model = resnet()
    graph = trace(model, IMAGE, blocks=True)
    plan = planned(graph, random_subsets(graph, seed=2), removed_blocks=REMOVED)
    small = cut(model, plan)
    save(small, plan, tmp_path / "out", factory=RESNET, input_size=(3, 4, 4))
    return tmp_path / "out", small


def test_removed_blocks_stand_in_the_architecture_and_come_back_removed(saved):
    path, small = saved
    assert json.loads((path / "architecture.json").read_text())["removed"] == REMOVED
    again, images = load(path), torch.rand(2, 3, 4, 4)
    assert [name for name, module in again.named_modules() if isinstance(module, Removed)] == REMOVED
    assert torch.equal(again(images), small(images))
    assert list(again.state_dict()) == list(small.state_dict())


def test_a_network_without_blocks_is_saved_again_like_any_other(saved, tmp_path):
    path, _ = saved
    graph = trace(load(path), IMAGE, blocks=True)
    assert [block.name for block in graph.blocks] == ["blocks.2"]
    plan = planned(graph, {}, removed_blocks=["blocks.2"])
    save(cut(load(path), plan), plan, tmp_path / "again", factory=RESNET, input_size=(3, 4, 4))
    assert json.loads((tmp_path / "again" / "architecture.json").read_text())["removed"] == [
        "blocks.0",
        "blocks.2",
        "blocks.3",
    ]


def test_a_clean_process_rebuilds_it(saved):
    path, small = saved
    images = torch.rand(2, 3, 4, 4)
    torch.save({"images": images, "logits": small(images)}, path.parent / "wanted.pt")
    code = """
import sys, torch
from load import load
wanted = torch.load("wanted.pt", weights_only=True)
torch.set_num_threads(1)
assert torch.equal(load("out")(wanted["images"]), wanted["logits"])
assert not any(name.split(".")[0] == "pipeline" for name in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=path.parent)


def test_a_factory_without_such_a_block_is_refused_by_name(saved, tmp_path):
    _, small = saved
    plan = planned(trace(resnet(), IMAGE), {})
    small.extra = Removed()
    with pytest.raises(ArtifactError, match="extra: Removed, not nothing"):
        save(small, plan, tmp_path / "other", factory=RESNET)
