"""The artifact: what a run leaves for others."""
