"""The life of a run: launch, attempts, checkpoints, resumption and shutdown."""
