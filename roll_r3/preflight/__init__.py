"""Checks and plans before anything starts. No engine is imported, nothing is downloaded, no code is executed."""
