"""Processes: who runs which unit, what happens when one dies, and the only code that imports ray."""
