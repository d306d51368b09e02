"""What lets the engines run on machines they were not written for: one module per engine, each a no-op elsewhere."""
