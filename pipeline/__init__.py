"""Distributed pruning of large networks. The library for one process; `jobs/` and `python -m pipeline` run it on Ray.

graph = pipeline.trace(model, example_inputs)
saliency = pipeline.score(model, graph, batches, criterion="taylor")
plan = pipeline.plan(graph, saliency, pipeline.Budget(macs=0.5))
small = pipeline.cut(model, plan)
pipeline.save(small, plan, "out/")
"""

from pipeline.export.artifact import load, save
from pipeline.pruning.allocation import plan
from pipeline.pruning.plan import Budget, Plan
from pipeline.pruning.reference import mask
from pipeline.pruning.surgery import cut
from pipeline.pruning.trials import trace
from pipeline.pruning.verify import verify
from pipeline.saliency.score import score

__all__ = ["Budget", "Plan", "cut", "load", "mask", "plan", "save", "score", "trace", "verify"]
