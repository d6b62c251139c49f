"""Channel groups by label propagation: labels (slots, classes), rules (one per operation), tracer (the run), groups."""

from pipeline.models.trace.table import RULES, Call, Rule, rule
from pipeline.models.trace.tracer import propagate

__all__ = ["RULES", "Call", "Rule", "propagate", "rule"]
