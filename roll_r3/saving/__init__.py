"""Checkpoints on disk: their directories, the manifest with checksums, and the training state."""
