"""Channel groups by label propagation: labels.py (slots, classes), rules.py (one per operation), tracer.py (the run)."""

from pipeline.models.trace.rules import RULES, Rule, rule
from pipeline.models.trace.tracer import propagate

__all__ = ["RULES", "Rule", "propagate", "rule"]
