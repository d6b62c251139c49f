"""Runs: each module is one RunConfig and a command."""
