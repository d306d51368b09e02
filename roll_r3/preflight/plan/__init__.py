"""Plan of a run, computed without starting anything (`--plan`).

Places, layers and traffic are exact. Memory is computed, not measured: no run on a GPU has confirmed these figures.
"""
