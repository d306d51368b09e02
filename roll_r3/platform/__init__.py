"""CPU support for libraries written for GPUs: one module per library, each inactive elsewhere."""
