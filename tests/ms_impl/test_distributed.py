"""What msrun tells a process, and how it ends; tests/end_to_end trains with several."""

import subprocess
import sys

import mindspore as ms
import pytest
from mindspore import Tensor
from mindspore.run_check._check_version import AscendEnvChecker

import ms_impl.distributed as distributed
from common.errors import UserError
from common.training import Shard


def test_alone() -> None:
    with distributed.joined("cpu") as shard:
        assert shard == Shard()
        assert distributed.sum_values(Tensor([3.0], ms.float32)).asnumpy().tolist() == [3.0]


def test_environment_that_is_not_msruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    with pytest.raises(UserError, match="without MS_ROLE, MS_SCHED"), distributed.joined("cpu"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"), distributed.joined("cpu"):
        pass


def test_versions_of_cann_are_those_that_mindspore_takes() -> None:
    assert list(distributed.CANN) == AscendEnvChecker(None).version


@pytest.mark.parametrize("leaves", [True, False])
def test_nothing_is_taken_down_after_the_handlers(leaves: bool) -> None:
    """Those that are younger than the import have run, and what they print is not lost."""
    program = f"""
import atexit
import ms_impl

class Late:
    def __del__(self):
        print("taken down")

late = Late()
atexit.register(print, "handler")
if {leaves}:
    ms_impl.leaving.leave_at_once()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n")[:-1] == ["handler"] + ["taken down"] * (not leaves)
