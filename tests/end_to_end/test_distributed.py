"""Training by several processes, started by the scripts that a user starts."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
import yaml

from common.checkpoint import load_checkpoint, save_checkpoint
from common.config import RunConfig
from common.data.store import write_records
from tests.conftest import REPOSITORY
from tests.networks import fill_value
from tests.training import textbook_records, tiny_run
from torch_impl.train_dit import Trainer, train

GPU = REPOSITORY / "scripts" / "run_gpu.sh"
CPU = ("--device", "cpu")
#: Generous, for a busy machine; how long the others live after a death is measured apart.
TIMEOUT = 240


@dataclass(frozen=True)
class Run:
    """A run on a disk.

    Attributes:
        config: its YAML file.
        settings: the same.
        alone: folder of the run by one process.
    """

    config: Path
    settings: RunConfig
    alone: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that starts from a network without zeros; five crystals do not divide evenly.

    AdamW makes steps of the same size out of gradients that are nothing but rounding, as most are
    at birth; and small steps keep apart what belongs apart.
    """
    folder = tmp_path_factory.mktemp("tiny")
    records = textbook_records()
    write_records(records, folder / "textbook.parquet")
    start = Trainer(tiny_run(), records, records).model_arrays()
    filled = {
        name: fill_value(name, array.shape) if name.startswith("model.") else array
        for name, array in start.items()
    }
    run = tiny_run(
        folder / "textbook.parquet",
        learning_rate=1e-4,
        batch_size=5,
        init_from=str(folder / "filled"),
    )
    save_checkpoint(folder / "filled", config=run.model_dump(mode="json"), model=filled)
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    train(run, folder / "alone", device="cpu")
    return Run(config, run, folder / "alone")


class Script:
    """A script that runs, and every process that it has started, directly or through others."""

    def __init__(self, script: Path, *arguments: object, **environment: str) -> None:
        self._mark = {"TEST_RUN": uuid4().hex}
        self._process = subprocess.Popen(
            ["bash", str(script), *map(str, arguments)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment | self._mark,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self) -> tuple[int, str, str]:
        """Exit status, output and errors; nothing of it stays behind."""
        try:
            output, errors = self._process.communicate(timeout=TIMEOUT)
        finally:
            for member in self.members():
                member.kill()
        return self._process.returncode, output, errors

    def members(self) -> list[psutil.Process]:
        """Those that are alive."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if self._mark.items() <= process.environ().items():
                    found.append(process)
        return found

    def worker(self, **environment: str) -> psutil.Process:
        """The training process that has this in its environment."""
        command = ["-m", "common", "train"]
        found = [
            member
            for member in self.members()
            if member.cmdline()[1:4] == command and environment.items() <= member.environ().items()
        ]
        assert len(found) == 1
        return found[0]

    def wait_for(self, path: Path, lines: int) -> None:
        """Until a log has so many lines."""
        deadline = time.monotonic() + TIMEOUT
        while not path.is_file() or path.read_text().count("\n") < lines:
            assert self._process.poll() is None, self.finish()
            assert time.monotonic() < deadline
            time.sleep(0.2)


def result(script: Path, *arguments: object, **environment: str) -> tuple[int, str, str]:
    """Runs a script; see ``Script.finish``."""
    return Script(script, *arguments, **environment).finish()


def rows(folder: Path) -> list[dict[str, float]]:
    """What a run has logged, without the time it took."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{key: v for key, v in line.items() if key != "seconds"} for line in lines]


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """The same kinds, steps and figures."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert one.pop("kind") == other.pop("kind")
        assert one == pytest.approx(other, rel=1e-5), one["step"]


def logs(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in out.glob("logs/*/*.log")}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# PyTorch


@pytest.fixture(scope="session")
def by_torch(tiny: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run by two processes with torchrun."""
    out = tmp_path_factory.mktemp("gpu") / "run"
    code, output, errors = result(GPU, *CPU, "--nproc", 2, "--out", out, tiny.config)
    assert code == 0, errors
    assert "step 6 of 6" in output
    return out


def test_two_processes_train_as_one(tiny: Run, by_torch: Path) -> None:
    assert_same(rows(by_torch), rows(tiny.alone))
    assert load_checkpoint(by_torch / "final").config == tiny.settings.model_dump(mode="json")
    assert {"worker_0.log", "worker_1.log"} <= set(logs(by_torch))
    assert "step 6 of 6" in logs(by_torch)["worker_0.log"]


def test_two_machines_go_on(tiny: Run, by_torch: Path, tmp_path: Path) -> None:
    """With what one machine has left after its third step."""
    out = tmp_path / "run"
    shutil.copytree(by_torch / "step_00000003", out / "step_00000003")
    arguments = (*CPU, "--nproc", 1, "--out", out, tiny.config)
    master = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    machines = [Script(GPU, *arguments, NODE_RANK=str(node), **master) for node in (0, 1)]
    for machine in machines:
        code, _, errors = machine.finish()
        assert code == 0, errors
    assert_same(rows(out), [row for row in rows(tiny.alone) if row["step"] > 3])
    assert {"worker_0.log", "worker_1.log"} <= set(logs(out))


def test_killed_gpu_process_stops_the_others(tiny: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    endless = (tiny.config, "train.steps=1000000")
    script = Script(GPU, *CPU, "--nproc", 2, "--out", out, *endless)
    script.wait_for(out / "log.jsonl", 2)
    script.worker(RANK="1").kill()
    killed = time.monotonic()
    code, _, errors = script.finish()
    assert time.monotonic() - killed < 30
    assert not script.members()
    assert code == 128 + signal.SIGKILL
    assert re.fullmatch(r"error: rank 1 was killed by signal 9 \(KILL\).*worker_1\.log\)\n", errors)


def test_mistake_of_the_user_ends_the_run(tiny: Run, tmp_path: Path) -> None:
    """Found by the processes themselves; the script repeats what they say."""
    out = tmp_path / "run"
    setting = f"train.data={tmp_path / 'absent.parquet'}"
    code, _, errors = result(GPU, *CPU, "--nproc", 2, "--out", out, tiny.config, setting)
    assert code == 2
    assert re.match(r"error: rank [01] ended with status 2: error: no data set at .*absent", errors)


def test_what_is_missing_for_gpus(tmp_path: Path) -> None:
    """One line each."""
    code, _, errors = result(GPU, tmp_path / "absent.yaml", CUDA_VISIBLE_DEVICES="")
    assert code == 2
    lines = errors.splitlines()
    assert len(lines) == 2
    assert re.match(r"error: torch .* CUDA.*nvidia-smi", lines[0])
    assert re.match(r"error: .*absent\.yaml: No such file or directory", lines[1])


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ((), {}, "CONFIG is missing"),
        (("--device", "tpu", "x.yaml"), {}, "--device tpu"),
        (("--device", "cpu", "x.yaml"), {}, "needs --nproc"),
        (("--nproc", "0", "x.yaml"), {}, "--nproc 0"),
        (("--nproc",), {}, "--nproc needs a value"),
        (("--resume", "x.yaml"), {}, "no option --resume"),
        (("x.yaml", "steps"), {}, "'steps' is no KEY=VALUE"),
        (("x.yaml",), {"PYTHON": "/absent/python"}, "no Python 3.11 at /absent/python"),
        (("x.yaml",), {"NNODES": "2"}, "MASTER_ADDR"),
        (("x.yaml",), {"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "NODE_RANK=2"),
        (("x.yaml",), {"NNODES": "all"}, "NNODES all"),
    ],
)
def test_wrong_call_of_the_gpu_script(
    arguments: tuple[str, ...], environment: dict[str, str], expected: str
) -> None:
    code, output, errors = result(GPU, *arguments, **environment)
    assert code == 2
    assert not output
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert expected in errors


def test_help() -> None:
    for script in (GPU,):
        code, output, errors = result(script, "--help")
        assert (code, errors) == (0, "")
        assert "CONFIG [KEY=VALUE ...]" in output
        assert output.endswith("named.\n")
