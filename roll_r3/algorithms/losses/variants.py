"""Registry of the policy-gradient losses, by `pg_variant`.

To add one: a module here, a row below, its name in `pg_variant`, its parameters in `PgArgsConfig`, and the rows of
`roll_r3.config.rules.losses` that say which settings it reads.
"""

from __future__ import annotations

from roll_r3.algorithms.losses.base import PgLoss
from roll_r3.algorithms.losses.cispo import cispo
from roll_r3.algorithms.losses.dppo import dppo_tv
from roll_r3.algorithms.losses.kimi15 import kimi15
from roll_r3.algorithms.losses.ppo import ppo
from roll_r3.algorithms.losses.tis import tis
from roll_r3.algorithms.losses.topr import topr
from roll_r3.algorithms.losses.vanilla import vanilla

PG_LOSSES: dict[str, PgLoss] = {
    "ppo": ppo,
    "vanilla": vanilla,
    "tis": tis,
    "topr": topr,
    "cispo": cispo,
    "kimi15": kimi15,
    "dppo_tv": dppo_tv,
}
