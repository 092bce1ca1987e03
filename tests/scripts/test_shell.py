"""Shell scripts: what ShellCheck says of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SHELLCHECK = Path(sys.executable).with_name("shellcheck")
SCRIPTS = sorted((REPOSITORY / "scripts").glob("*.sh"))


def complaints(script: Path) -> str:
    """Also of what a script sources."""
    command = [SHELLCHECK, "--external-sources", "--source-path=SCRIPTDIR", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_is_content(script: Path) -> None:
    assert not complaints(script)


def test_shellcheck_can_complain(tmp_path: Path) -> None:
    script = tmp_path / "broken.sh"
    script.write_text("#!/usr/bin/env bash\nrm -rf $1/\n")
    assert "SC2086" in complaints(script)
