"""Channel groups by label propagation: labels (slots, classes), rules (one per operation), sizes (what the source
states), tracer (the run), groups; and residual blocks."""

from pipeline.models.trace.blocks import find_blocks
from pipeline.models.trace.table import RULES, Call, Rule, rule
from pipeline.models.trace.tracer import Deadline, TraceTimeout, propagate

__all__ = ["RULES", "Call", "Deadline", "Rule", "TraceTimeout", "find_blocks", "propagate", "rule"]
