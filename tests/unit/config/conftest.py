from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from roll_r3.config.findings.report import Finding, InvalidConfigError, has_errors
from roll_r3.config.load import LoadedConfig, load
from roll_r3.config.rules.example import MINIMAL

LoadText = Callable[..., LoadedConfig]


@pytest.fixture
def load_text(tmp_path: Path) -> LoadText:
    """Load a configuration from text, with overrides; raises when loading finds errors."""

    def run(text: str = MINIMAL, *overrides: str) -> LoadedConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        loaded = load(path, overrides)
        if has_errors(loaded.findings):
            raise InvalidConfigError(loaded.findings, loaded.origins)
        return loaded

    return run


def findings_of(load_text: LoadText, text: str, *overrides: str) -> list[Finding]:
    with pytest.raises(InvalidConfigError) as caught:
        load_text(text, *overrides)
    return list(caught.value.findings)


def only(load_text: LoadText, text: str, *overrides: str) -> Finding:
    findings = findings_of(load_text, text, *overrides)
    assert len(findings) == 1, findings
    return findings[0]
