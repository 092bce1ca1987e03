"""Shell scripts: what ShellCheck says of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SHELLCHECK = Path(sys.executable).with_name("shellcheck")
SCRIPTS = sorted((REPOSITORY / "scripts").glob("*.sh"))


def complaints(script: Path) -> str:
    """Of every severity, also of what a script sources; the settings are in .shellcheckrc."""
    command = [SHELLCHECK, "--severity=style", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_is_content(script: Path) -> None:
    assert not complaints(script)


def test_shellcheck_can_complain(tmp_path: Path) -> None:
    """Also of trifles."""
    script = tmp_path / "broken.sh"
    script.write_text("#!/usr/bin/env bash\nrm -rf $1/\necho $(date)\n[ `id -u` ]\n")
    found = complaints(script)
    for code in ("SC2086 (info)", "SC2005 (style)", "SC2046 (warning)"):
        assert code in found
