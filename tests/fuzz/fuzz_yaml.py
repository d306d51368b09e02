"""Hostile YAML files and overrides, through the command line's own main()."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from fuzz_harness import HOSTILE, Verdict, Wrong, mutated
from hypothesis import strategies as st

from roll_r3.config.load import load_text
from roll_r3.config.reading.field_paths import fields_at
from roll_r3.config.rules.example import MINIMAL
from roll_r3.config.rules.paths import ENGINE, PP, TRAIN
from roll_r3.run import main

QUICKSTART = (Path(__file__).parents[2] / "configs" / "quickstart.yaml").read_bytes()
MESSAGE = 200_000
"""Largest length of a report: one finding per line, and every field may be wrong."""


def _fields(path: str = "") -> list[str]:
    inner = [f"{path}.{name}" if path else name for name in fields_at(path)]
    return inner + [deeper for field in inner for deeper in _fields(field)]


FIELDS = sorted(set(_fields()))
SCALARS = [
    "!!python/object/apply:os.mkdir [touched]", "!!python/name:os.system ''",
    "!!python/object/new:os.mkdir [touched]", "!!python/module:os", "!!binary aGVsbG8=", "!!set {a}",
    "!!timestamp 2001-01-01", "!!int 3x", "!!float abc", "!<tag:yaml.org,2002:python/tuple> [1]", "!local x",
    "&a [*a]", "*nowhere", "&x 1", "<<", "${seed}", "${..}", "${oc.env:HOME}", "${oc.eval:1}", "${a.b}",
    "${seed}${seed}", "${actor_train}", "${exp_name." + "a." * 60 + "b}", "${rewards." + "9" * 5000 + "}", "???",
    "1e999", "-.inf", ".nan", "0x" + "f" * 5000, "9" * 5000, "1_000", "0o17", "1:30", "2001-01-01", "yes", "~", "''",
    '"\\0"', '"\\ud800"', "|\n  x", "[1, 2", "{a: 1", "'", "range(10**9)", "list(range(0,10**9))",
    "list(range(0, 9" + "9" * 5000 + "))", "[" * 200 + "]" * 200, "__import__('os').mkdir('touched')",
]  # fmt: skip
LINES = [
    "<<: {seed: 3}", "seed: 1\nseed: 2", "? [a, b]\n: c", "? {a: b}\n: c", "1: 2", "true: x", "null: x",
    "--- \na: 1", "...", "%YAML 9.9\n---", "defaults:\n  - /etc/passwd", "defaults: [../../../etc/passwd]",
    "hydra: {run: {dir: /tmp/x}}",
    "a: &a [x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: [*c,*c,*c,*c,*c,*c,*c,*c]",
    "b0: x\n" + "".join(f"b{i}: ${{b{i - 1}}}${{b{i - 1}}}\n" for i in range(1, 40)), "x: ${y}\ny: ${x}", "\t- a",
    "k" * 5000 + ": 1", "".join(" " * i + "a:\n" for i in range(80)), "custom: {" + "a: {" * 60 + "}" * 61,
    "a: [" + "1," * 30_000 + "]", '"\\ud800": 1', 'rewards: {"\\ud800": {}}',
    "? " + "k" * 300_000 + "\n: [" + "0," * 5000 + "]",
    'rewards: {r: {reward: math, kwargs: {"\\udc80": 1}}}', "rewards: {a: &a {reward: math}, b: *a}", "'*': 1", "'': 1",
]  # fmt: skip
OVERRIDES = [
    "", "=", "a", "=1", ".=1", "a..b=1", "actor_train.device_mapping.0=3",
    "actor_train.device_mapping." + "9" * 5000 + "=1", "a." * 3000 + "b=1",
    "seed=!!python/object/apply:os.mkdir [touched]", "seed=${seed}", "exp_name=../../x", "seed = 1", "seed=\0",
    "exp_name=\udcff", "actor_train=null", "actor_train.strategy_args.strategy_config.a.b.c=1", "seed=" + "[" * 900,
    "\udc80=1", "rewards.\udc80={}", "k" * 5000 + "=1",
]  # fmt: skip
LAYOUTS = [
    "Et*99999999999L", "Et*900000000L", "E(t*9999)*9999L", "Et*(2)*5000L", "(" * 60_000, "Et*24|t*24L", "Et*48L",
    "Et*0L", "E" + "|" * 3000 + "L", "Et*24,(|t)*24L", "t*24|t*24", "\u0665" * 9,
]  # fmt: skip
DEVICES = [
    "range(50000) + range(50000)", "list(range(0,100000)) + " * 3000 + "[1]", "range(" + "9" * 50 + ")", "range(0)",
    "range(9, 0, -1)", "range(0, 9, -1)", "[1" + " " * 40_000, "[4611686018427387904]", "[65535]", "65536", "[0] + [0]",
    "range(512)", "range(1000000)", "[0, 2, 4000]", "[-1]", "4", "range(0, 65536, 65535)",
]  # fmt: skip
LARGE = [
    "x: [" + "true," * 19_000 + "]", "".join(f"k{i}: 1\n" for i in range(9000)),
    "".join(f"k{i}: ${{z}}\n" for i in range(9000)), "seed: 1\n" * 9000, "x: [" + ".inf," * 19_000 + "]",
    "rewards: {" + ",".join(f"r{i}: {{reward: no}}" for i in range(4500)) + "}",
    "rewards: {" + ",".join(f"r{i}: {{worker_cls: a.MathRuleRewardWorker}}" for i in range(4500)) + "}",
    "actor_train: {device_mapping: [" + "9223372036854775807," * 9000 + "]}",
]  # fmt: skip
ALIASES = """\
rewards:
  a: &a {reward: math, tag_included: [a]}
  b: *a
"""
Action = Literal["--print-config", "--validate-only", "--plan", "--plan --format json"]


@dataclass(frozen=True)
class Drawn:
    """One input."""

    text: bytes
    overrides: tuple[str, ...]
    action: Action
    said: tuple[tuple[str, object], ...] = ()
    """Dotted path -> its required value if the file is accepted."""


@st.composite
def _files(draw: st.DrawFn) -> Drawn:
    action: Action = draw(st.sampled_from(list(get_args(Action))))
    # a large file takes a second or two
    kind = draw(st.sampled_from(["hostile"] * 72 + ["aimed"] * 18 + ["aliased"] * 9 + ["large"]))
    if kind == "aimed":
        return Drawn(MINIMAL.encode(), draw(_aimed()), action)
    if kind == "aliased":
        return draw(_aliased())
    if kind == "large":
        return Drawn(f"{MINIMAL}{draw(st.sampled_from(LARGE))}\n".encode(), (), action)
    text, overrides = draw(_hostile())
    return Drawn(text, overrides, action)


@st.composite
def _aimed(draw: st.DrawFn) -> tuple[str, ...]:
    """Draw overrides of devices and layers."""
    role = draw(st.sampled_from(["actor_train", "actor_infer"]))
    overrides = [f"{role}.device_mapping={draw(st.sampled_from(DEVICES))}"]
    if draw(st.booleans()):
        overrides.append(f"{TRAIN}.pipeline_model_parallel_layout={draw(st.sampled_from(LAYOUTS))}")
        overrides += draw(st.sampled_from([[], ["actor_train.device_mapping=range(2)", f"actor_train.{PP}=2"]]))
    return (*overrides, *draw(st.sampled_from([(), ("rollout_batch_size=4096", f"{ENGINE}.host=0.0.0.0")])))


@st.composite
def _aliased(draw: st.DrawFn) -> Drawn:
    """Draw a file with an alias, and an override of only one of its uses."""
    changed, other = draw(st.permutations(["a", "b"]))
    number = draw(st.integers(2, 9))
    tagged = ("actor_train.data_args.file_name=x.jsonl", "actor_train.data_args.domain=tag")
    overrides = (*tagged, f"rewards.{changed}.timeout={number}", f"rewards.{changed}.tag_included.0=c")
    said = ((f"rewards.{changed}.timeout", number), (f"rewards.{other}.tag_included", ["a"]))
    return Drawn((MINIMAL + ALIASES).encode(), overrides, "--print-config", said)


@st.composite
def _hostile(draw: st.DrawFn) -> tuple[bytes, tuple[str, ...]]:
    text = draw(st.sampled_from([MINIMAL.encode(), QUICKSTART]))
    kind = draw(st.sampled_from(["planted", "planted", "lines", "mutated", "overridden", "as it is"]))
    overrides: list[str] = []
    if kind == "planted":
        for _ in range(draw(st.integers(1, 2))):
            value = draw(st.sampled_from(SCALARS) | HOSTILE.map(lambda v: yaml.safe_dump(v, default_flow_style=True)))
            overrides.append(f"{draw(st.sampled_from(FIELDS))}={value.removesuffix('...').strip()}")
        if draw(st.booleans()):  # the same, in the file
            text += b"".join(_as_lines(*override.split("=", 1)) for override in overrides)
            overrides = []
    elif kind == "lines":
        lines = draw(st.lists(st.sampled_from(LINES), min_size=1, max_size=2))
        text = text + ("\n".join(lines) + "\n").encode()
    elif kind == "mutated":
        text = draw(mutated(text))
    elif kind == "overridden":
        overrides = draw(st.lists(st.sampled_from(OVERRIDES), min_size=1, max_size=3))
    whole = draw(st.sampled_from(["", "", "", "", "utf-16", "utf-32", "bom", "crlf", "nul", "latin"]))
    if whole.startswith("utf"):
        text = text.decode(errors="replace").encode(whole)
    elif whole:
        text = {"bom": b"\xef\xbb\xbf" + text, "crlf": text.replace(b"\n", b"\r\n"), "nul": text + b"\0",
                "latin": text + b"# \xe9\n"}[whole]  # fmt: skip
    return text, tuple(overrides)


def _as_lines(path: str, value: str) -> bytes:
    keys = path.split(".")
    opened = "".join(f"{'  ' * i}{key}:\n" for i, key in enumerate(keys[:-1]))
    return f"{opened}{'  ' * (len(keys) - 1)}{keys[-1]}: {value}\n".encode(errors="surrogatepass")


def call(function: Any, arguments: list[str]) -> tuple[int, str, str]:
    """Return (exit status, stdout, stderr) of a command line's main()."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = function(arguments)
        except SystemExit as error:  # argparse
            status = error.code
    return status, out.getvalue(), err.getvalue()


def check_said(status: int, err: str) -> None:
    """Require a message with every rejection, printable and without a traceback."""
    if "Traceback" in err:
        raise Wrong(f"a traceback: {err[-500:]}")
    if status not in (0, 1, 2):
        raise Wrong(f"exit status {status}")
    if status and not err.strip():
        raise Wrong("rejected without a message")
    if len(err) > MESSAGE:
        raise Wrong(f"a message of {len(err)} characters")
    if hidden := [line for line in err.split("\n") if not line.isprintable()]:
        raise Wrong(f"a message that cannot be shown: {hidden[0][:300]!r}")


class Yaml:
    name = "yaml"

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name) / "config.yaml"
        self._here = Path.cwd()
        os.chdir(self._folder.name)

    def inputs(self) -> st.SearchStrategy[Any]:
        return _files()

    def judge(self, value: Drawn) -> Verdict:
        self._file.write_bytes(value.text)
        arguments = ["--config", str(self._file), "--elsewhere", *value.action.split(), "--", *value.overrides]
        status, out, err = call(main, arguments)
        # JSON has uncut values
        check_said(status, out[:MESSAGE] if status and value.action.endswith("json") else err)
        (out + err).encode()
        if os.listdir(self._folder.name) != [self._file.name]:
            raise Wrong("reading created a file")
        if status:
            if value.said:
                raise Wrong(f"rejected, but valid: {err[:500]}")
            return "refused"
        if value.action == "--print-config":
            self._check_printed(value, out)
        elif value.action.endswith("json"):
            self._check_plan(json.loads(out))
        elif value.action == "--validate-only" and not out.startswith("valid: "):
            raise Wrong(f"valid, and says {out[:100]!r}")
        return "taken"

    def _check_printed(self, value: Drawn, out: str) -> None:
        again = load_text(out, "printed.yaml")
        if again.findings:
            raise Wrong(f"accepted, but its printed form is not: {again.findings[0].why}")
        printed = yaml.safe_load(out)
        for path, expected in value.said:
            found = printed
            for key in path.split("."):
                found = found[key]
            if found != expected:
                raise Wrong(f"{path} is {found!r}, not {expected!r}")
        if not value.overrides:
            self._compare(value.text, printed)

    def _check_plan(self, plan: dict[str, Any]) -> None:
        """Require every device within the plan, and every layer on one stage."""
        used = [device for part in (*plan["roles"], *plan["engines"]) for device in part["devices"]]
        if min(used) < 0 or plan["devices"] != max(used) + 1:
            raise Wrong(f"a plan of {plan['devices']} devices uses {min(used)} to {max(used)}")
        layers = [n for stage in plan["roles"][0]["stages"] for chunk in stage["chunks"] for n in chunk["layers"]]
        if layers and sorted(layers) != list(range(plan["model"]["num_layers"])):
            raise Wrong(f"a plan places layers {layers}")

    def _compare(self, text: bytes, printed: dict[str, Any]) -> None:
        """Compare plain values with those read by PyYAML alone."""
        said = yaml.safe_load(text.decode("utf-8-sig"))
        for name in ("exp_name", "seed", "max_steps", "rollout_batch_size", "prompt_length"):
            value = said.get(name, printed[name])
            if "${" not in str(value) and value != printed[name]:
                raise Wrong(f"{name} is {value!r} in the file and {printed[name]!r} in the configuration")

    def close(self) -> None:
        os.chdir(self._here)
        self._folder.cleanup()
