"""Side-by-side measurements: ours against a peer or a limit, in one run. Ratios are what counts."""
