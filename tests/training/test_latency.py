from __future__ import annotations

import json

from torch import Tensor, nn

from pipeline.training.latency import measure_latency


class Logged(nn.Module):
    def __init__(self, name: str, log: list[tuple[str, int]]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def __deepcopy__(self, memo: object) -> Logged:
        return Logged(self.name, self.log)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        self.log.append((self.name, len(x)))
        return x


def test_models_take_turns_and_the_answer_is_plain_data(monkeypatch):
    monkeypatch.setattr("pipeline.training.latency.WARMUP_S", 0.0)
    log: list[tuple[str, int]] = []
    models = {name: Logged(name, log) for name in ("dense", "pruned")}
    result = measure_latency(models, (1, 2, 2), batch_sizes=(1, 4), runs=3)
    per_size = [("dense", 1)] * 2 + [("pruned", 1)] * 2 + [("dense", 1), ("pruned", 1)] * 3
    assert log == per_size + [(name, 4) for name, _ in per_size]
    assert json.loads(json.dumps(result)) == result
    assert (result["device"], result["runs"], list(result["batch"])) == ("cpu", 3, ["1", "4"])
    times = result["batch"]["4"]["dense"]
    assert 0 < times["min_ms"] <= times["median_ms"] <= times["max_ms"]
    assert times["rows_per_s"] == 4000 / times["median_ms"]
