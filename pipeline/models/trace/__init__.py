"""Channel groups by label propagation: labels (slots, classes), rules (one per operation), sizes (what the source
states), tracer (the run), groups."""

from pipeline.models.trace.table import RULES, Call, Rule, rule
from pipeline.models.trace.tracer import Deadline, TraceTimeout, propagate

__all__ = ["RULES", "Call", "Deadline", "Rule", "TraceTimeout", "propagate", "rule"]
