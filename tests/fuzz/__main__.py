"""Run thousands of hostile inputs and print a table of their verdicts: `make fuzz ARGS="--inputs 10000"`.

Exit status: 0 none failed, 1 some did.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

from families import FAMILIES
from fuzz_harness import HEADING, Tally, tally


def main() -> int:
    parser = argparse.ArgumentParser(description="Give what reads from outside hostile inputs.")
    parser.add_argument("--inputs", type=int, default=2000, help="of all families together (default: 2000)")
    parser.add_argument("--seed", type=int, default=1, help="other inputs for another number (default: 1)")
    parser.add_argument("--family", choices=sorted(FAMILIES), help="one alone")
    options = parser.parse_args()
    logging.disable(logging.ERROR)  # refused inputs are logged, thousands of times
    chosen = [options.family] if options.family else list(FAMILIES)
    share = sum(FAMILIES[name].share for name in chosen)
    total = Tally("all")
    print(HEADING, flush=True)
    for name in chosen:
        family = FAMILIES[name].kind()
        try:
            found = tally(family, -(-options.inputs * FAMILIES[name].share // share), options.seed)
        finally:
            family.close()
        print(found, flush=True)
        total.taken, total.refused = total.taken + found.taken, total.refused + found.refused
        total.failures += found.failures
        total.slowest, total.seconds = max(total.slowest, found.slowest), total.seconds + found.seconds
    print(total)
    for failure in total.failures:
        print(f"\nFAILED {failure}")
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
