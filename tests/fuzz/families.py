"""All families of hostile inputs, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fuzz_answers import Answers
from fuzz_checkpoints import Checkpoints, Tensors
from fuzz_harness import Family
from fuzz_http import Http
from fuzz_pretrain import Pretrain
from fuzz_receiver import Receiver
from fuzz_rows import Rows
from fuzz_wire import Wire
from fuzz_yaml import Yaml


@dataclass(frozen=True)
class Entry:
    kind: Callable[[], Family]
    share: int
    """Share of the inputs, relative to the other families; chosen by the time of an input."""


FAMILIES: dict[str, Entry] = {
    "wire": Entry(Wire, 5),
    "answers": Entry(Answers, 6),
    "http": Entry(Http, 1),
    "receiver": Entry(Receiver, 2),
    "yaml": Entry(Yaml, 3),
    "checkpoints": Entry(Checkpoints, 2),
    "tensors": Entry(Tensors, 2),
    "pretrain": Entry(Pretrain, 2),
    "rows": Entry(Rows, 8),
}
