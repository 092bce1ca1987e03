"""Scripts say in one line what is wrong with what they are given."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["fit_prior.py", "--data", "absent.csv"], "no data set at absent.csv"),
        (["check_language.py", "absent.csv"], "no data set at absent.csv"),
        (["compare_backends.py", "training", "absent.yaml"], "absent.yaml: No such file"),
        (["compare_backends.py", "language", "configs/crystal_dit_small_fm.yaml"], "no run of a"),
        (["plan_language.py", "configs/crystal_dit_small_bg.yaml"], "a plan is for"),
        (["plan_language.py", "configs/glm4_tiny.yaml"], "a plan is for"),
    ],
)
def test_one_line(command: list[str], told: str) -> None:
    script, *arguments = command
    path = str(REPOSITORY / "scripts" / script)
    done = subprocess.run(
        [sys.executable, path, *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
