"""Rows: where they lie, how they are counted and dealt out, and how an image becomes a tensor."""
