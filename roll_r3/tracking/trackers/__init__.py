"""Trackers of runs: a module for each library, and a thread around each of them."""
