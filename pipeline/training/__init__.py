"""Training on one or many workers, evaluation, batch-norm re-estimation, latency: numbers and collectives, no ray."""
