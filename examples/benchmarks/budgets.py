"""Bounds on the cost of replay, checked by tests/benchmarks; each is about three times the measured figure.

A tenfold regression breaks them; a busy machine does not.
"""

ENCODE, DECODE, VIEW = 20, 15, 25
"""Writing a group of 65,536 tokens, reading all of it, and half its layers, over a copy of as many bytes."""
COMPACT = 3
"""Checking an engine's answer and making it compact, over decoding its base64."""
STAGED, ROUTED = 10, 6
"""Prepared rows over a gather, and indices at every router over a gather and widening; 65,536 tokens."""
ROUTED_ON_EIGHT = 8
"""The same on one of eight ranks."""
PEAK = 2
"""The highest memory of preparation over its compact rows."""
READ_VIEWS, READ_PARCEL = 150, 200
"""Delivery of the rows of one of eight ranks (TP 2 with SP, CP 2, PP 2), over a copy of as many bytes."""
PEAK_OF_MANY = 8
"""The highest memory of a rank's whole pass over its rows, where these are some hundred kilobytes."""
SHARE = 0.03
"""Share of a tiny model's training step spent on routes."""
STEP = 1.3
"""The fastest step of a tiny model with R3 over the fastest without. The target for real ones is `STEP_TARGET`."""
STEP_TARGET = 1.02
