"""Which channels go (selection, allocation, plan), how they go (masks, surgery), and the proof (trials, verify)."""
