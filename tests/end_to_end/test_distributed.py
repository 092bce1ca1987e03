"""Training by several processes, started by the scripts that a user starts."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
import yaml

from common.checkpoint import load_checkpoint, save_checkpoint, save_step
from common.config import RunConfig
from common.data.store import Record, write_records
from common.machine import ascend_count
from common.training import Shard, run_training
from common.weights import MODEL_PREFIX
from tests.conftest import REPOSITORY
from tests.networks import fill_value
from tests.training import alike_records, textbook_records, tiny_run
from torch_impl.train_dit import Trainer, train

GPU = REPOSITORY / "scripts" / "run_gpu.sh"
ASCEND = REPOSITORY / "scripts" / "run_ascend_distributed.sh"
CPU = ("--device", "cpu")
#: Generous, for a busy machine; how long the others live after a death is measured apart.
TIMEOUT = 240
#: What an environment may have for other ends: by the names of the scripts' own variables, and as
#: clusters' operators set it for either framework's launcher.
NAMESAKES = {
    "CONFIG": "Release",
    "OUT": "/absent",
    "STOPPED": "1",
    "WORLD_SIZE": "2",
    "MS_WORKER_NUM": "2",
}


@dataclass(frozen=True)
class Run:
    """A run on a disk, by one process.

    Attributes:
        config: its YAML file.
        settings: the same.
        alone: its folder.
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
    run = write_run(tmp_path_factory.mktemp("tiny"), textbook_records(), batch_size=5)
    train(run.settings, run.alone, device="cpu")
    return run


def write_run(
    folder: Path,
    records: list[Record],
    model: dict[str, object] | None = None,
    **settings: object,
) -> Run:
    """Everything that the run needs; its network has no zeros."""
    data, filled, config = folder / "data.parquet", folder / "filled", folder / "tiny.yaml"
    write_records(records, data)
    run = tiny_run(data, model, learning_rate=1e-4, init_from=str(filled), **settings)
    start = Trainer(tiny_run(model=model), records, records).model_arrays()
    arrays = {
        name: fill_value(name, array.shape) if name.startswith(MODEL_PREFIX) else array
        for name, array in start.items()
    }
    save_checkpoint(filled, config=run.model_dump(mode="json"), model=arrays)
    config.write_text(yaml.safe_dump(run.model_dump(mode="json")))
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

    def members(self, *command: str, **environment: str) -> list[psutil.Process]:
        """Those that are alive, whose arguments begin so, and that have this environment."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # it has ended meanwhile
                if (self._mark | environment).items() <= process.environ().items() and tuple(
                    process.cmdline()[1 : 1 + len(command)]
                ) == command:
                    found.append(process)
        return found

    def worker(self, **environment: str) -> psutil.Process:
        """The training process that has this in its environment."""
        found = self.members("-m", "common", "train", **environment)
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
    arguments = (*CPU, "--nproc", 2, "--out", out, tiny.config)
    code, output, errors = result(GPU, *arguments, **NAMESAKES, LOG_DIR=str(out.parent))
    assert code == 0, errors
    assert "tiny: training on 14 rows, 2 processes\n" in output
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


def test_second_start_leaves_the_first_alone(tiny: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = (*CPU, "--nproc", 1, "--out", out, tiny.config, "train.steps=1000000")
    first = Script(GPU, *arguments)
    first.wait_for(out / "log.jsonl", 2)
    code, output, errors = result(GPU, *arguments)
    line = f"error: {out}: another process trains there; give another --out\n"
    assert (code, output, errors) == (2, "", line)
    logged = (out / "log.jsonl").read_text().count("\n")
    time.sleep(5)  # it looks for failures every second
    first.wait_for(out / "log.jsonl", logged + 2)
    first.members(str(GPU))[0].terminate()
    assert first.finish()[0] == 128 + signal.SIGTERM


def test_failed_machine_stops_the_others(tiny: Run, tmp_path: Path) -> None:
    """The first one's process would wait for the other's until its communication gives up."""
    out = tmp_path / "run"
    arguments = (*CPU, "--nproc", 1, "--out", out, tiny.config, "train.steps=1000000")
    master = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    machines = [Script(GPU, *arguments, NODE_RANK=str(node), **master) for node in (0, 1)]
    machines[0].wait_for(out / "log.jsonl", 2)
    machines[1].worker(RANK="1").kill()
    killed = time.monotonic()
    endings = [machine.finish() for machine in machines]
    assert time.monotonic() - killed < 30
    line = r"error: rank 1 was killed by signal 9 \(KILL\).*worker_1\.log\)\n"
    for code, _, errors in endings:
        assert code
        assert re.fullmatch(line, errors)


def test_end_that_is_asked_for(tiny: Run, tmp_path: Path) -> None:
    """What a cluster's scheduler, or Ctrl-C, asks the script for; the same command goes on."""
    out = tmp_path / "run"
    arguments = (*CPU, "--nproc", 2, "--out", out, tiny.config)
    script = Script(GPU, *arguments, "train.steps=1000000", "train.checkpoint_every=1000000")
    script.wait_for(out / "log.jsonl", 2)
    script.members(str(GPU))[0].terminate()
    code, output, errors = script.finish()
    assert (code, errors) == (128 + signal.SIGTERM, "")
    saved = load_checkpoint(out, optimizer=True)
    assert saved.state is not None
    step = saved.state["step"]
    line = f"stopped at step {step} of 1000000, which {saved.path} keeps; the same command goes on"
    assert line in output
    assert f"stopped at step {step}; the same command goes on" in logs(out)["worker_1.log"]


def test_mistake_of_the_user_ends_the_run(tiny: Run, tmp_path: Path) -> None:
    """Found by the processes themselves; the script repeats what they say."""
    out = tmp_path / "run"
    damaged = tmp_path / "damaged.parquet"
    damaged.write_text("no table")
    setting = f"train.data={damaged}"
    code, _, errors = result(GPU, *CPU, "--nproc", 2, "--out", out, tiny.config, setting)
    assert code == 2
    assert re.match(r"error: rank [01] ended with status 2: error: .*damaged\.parquet", errors)


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
        ((), NAMESAKES, "CONFIG is missing"),
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
        (
            ("x.yaml",),
            {"NNODES": "2", "MASTER_ADDR": "a", "MASTER_PORT": "70000"},
            "MASTER_PORT 70000: give one below 65536",
        ),
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


# MindSpore


class Rehearsal:
    """A run in this process by MindSpore, and others from the same start, with the same graph.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        from ms_impl.train_dit import Trainer

        records = alike_records()  # of one bucket, for which one graph is compiled
        settings = {"model": {"layers": 1}, "batch_size": 7, "edge_budget": 1024}
        self.run = write_run(folder, records, **settings)
        self.trainer = Trainer(self.run.settings, records, records)
        self._start = folder / "start"
        save_step(self._start, 0, **self.trainer.checkpoint())
        run_training(self.trainer, self.run.alone, resume=False)

    def again(self, out: Path) -> list[dict[str, float]]:
        """What a run logs from the start on, with the trainer as it is now."""
        shutil.copytree(self._start, out)
        run_training(self.trainer, out, resume=True)
        return rows(out)


@pytest.fixture(scope="session")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    """Seven crystals do not divide evenly."""
    pytest.importorskip("mindspore", reason="MindSpore is not installed")
    return Rehearsal(tmp_path_factory.mktemp("alike"))


def msrun(out: Path, *arguments: object, workers: int = 2, **environment: str) -> Script:
    """Processes on this machine's CPUs, which find each other on a port of their own."""
    options = ("--worker_num", workers, "--master_port", free_port(), "--out", out)
    return Script(ASCEND, *CPU, *options, *arguments, **environment)


@pytest.fixture(scope="session")
def by_msrun(alike: Rehearsal, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run by two processes with msrun."""
    out = tmp_path_factory.mktemp("ascend") / "run"
    code, output, errors = msrun(out, alike.run.config, **NAMESAKES).finish()
    assert code == 0, errors
    assert "step 6 of 6" in output
    return out


def test_two_mindspore_processes_train_as_one(alike: Rehearsal, by_msrun: Path) -> None:
    assert_same(rows(by_msrun), rows(alike.run.alone))
    assert len(rows(by_msrun)) == 8  # six steps, and the validation after every third
    config = load_checkpoint(by_msrun / "final").config
    assert config == alike.run.settings.model_dump(mode="json")
    assert {"worker_0.log", "worker_1.log", "scheduler.log"} <= set(logs(by_msrun))
    assert "step 6 of 6" in logs(by_msrun)["worker_0.log"]


def test_one_mindspore_process_trains(alike: Rehearsal, tmp_path: Path) -> None:
    """As on one NPU; msrun's scheduler stands beside it and trains nothing."""
    out = tmp_path / "run"
    code, _, errors = msrun(out, alike.run.config, workers=1).finish()
    assert code == 0, errors
    assert_same(rows(out), rows(alike.run.alone))


def test_two_mindspore_processes_go_on(alike: Rehearsal, by_msrun: Path, tmp_path: Path) -> None:
    """With what a kill after the third step leaves."""
    out = tmp_path / "run"
    shutil.copytree(by_msrun / "step_00000003", out / "step_00000003")
    code, _, errors = msrun(out, alike.run.config).finish()
    assert code == 0, errors
    assert_same(rows(out), [row for row in rows(alike.run.alone) if row["step"] > 3])


def test_other_training_is_noticed(
    alike: Rehearsal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another seed, and processes that do not hear of each other's gradients."""
    import ms_impl.train_dit as train_dit

    trainer, settings = alike.trainer, alike.run.settings
    assert_same(alike.again(tmp_path / "same"), rows(alike.run.alone))
    of_the_first_step = r"^1\n"
    seeded = settings.train.model_copy(update={"seed": 1})
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "config", settings.model_copy(update={"train": seeded}))
        with pytest.raises(AssertionError, match=of_the_first_step):
            assert_same(alike.again(tmp_path / "seed"), rows(alike.run.alone))
    monkeypatch.setattr(trainer, "shard", Shard(0, 2))
    monkeypatch.setattr(train_dit, "sum_values", lambda values: 2 * values)
    with pytest.raises(AssertionError, match=of_the_first_step):
        assert_same(alike.again(tmp_path / "deaf"), rows(alike.run.alone))


#: A network of few parts, which is soon compiled, and does not come to an end.
ENDLESS = (
    "train.steps=1000000",
    "train.init_from=null",
    "model.attention=false",
    "model.modulation=false",
)


@pytest.mark.parametrize("rank", [None, 0, 1], ids=["scheduler", "rank 0", "rank 1"])
def test_killed_mindspore_process_stops_the_others(
    alike: Rehearsal, tmp_path: Path, rank: int | None
) -> None:
    out = tmp_path / "run"
    script = msrun(out, alike.run.config, *ENDLESS)
    script.wait_for(out / "log.jsonl", 2)
    if rank is None:
        script.worker(MS_ROLE="MS_SCHED").kill()
    else:
        script.worker(MS_ROLE="MS_WORKER", RANK_ID=str(rank)).kill()
    killed = time.monotonic()
    code, _, errors = script.finish()
    assert time.monotonic() - killed < 30
    assert not script.members()
    if rank is None:
        status, line = 1, r"msrun's scheduler ended.*scheduler\.log\)"
    else:
        status = 128 + signal.SIGKILL
        line = rf"rank {rank} was killed by signal 9 \(KILL\).*worker_{rank}\.log\)"
    assert code == status
    assert re.fullmatch(f"error: {line}\n", errors)
    assert {"worker_0.log", "worker_1.log", "scheduler.log"} <= set(logs(out))


def test_mistake_of_the_user_ends_the_mindspore_run(alike: Rehearsal, tmp_path: Path) -> None:
    """Found by the processes themselves; the script repeats what they say."""
    damaged = tmp_path / "damaged.parquet"
    damaged.write_text("no table")
    setting = f"train.data={damaged}"
    code, _, errors = msrun(tmp_path / "run", alike.run.config, setting).finish()
    assert code == 2
    assert re.match(r"error: rank [01] ended with status 2: error: .*damaged\.parquet", errors)


def fake_version(folder: Path, package: str, version: str) -> dict[str, str]:
    """An environment in which a package seems to be there in another version."""
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return {"PYTHONPATH": str(folder)}


def fake_cann(folder: Path, version: str, npus: int) -> dict[str, str]:
    """An environment with CANN and a driver, as far as the script looks."""
    (folder / "compiler").mkdir()
    (folder / "compiler" / "version.info").write_text(f"Version={version}.0.1\n")
    npu_smi = folder / "npu-smi"
    npu_smi.write_text(f"#!/bin/sh\necho 'Total Count : {npus}'\n")
    npu_smi.chmod(0o755)
    return {"ASCEND_HOME_PATH": str(folder), "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ASCEND_HOME_PATH": ""}, "CANN is not found (ASCEND_HOME_PATH is not set): source"),
        ({"ASCEND_HOME_PATH": "/absent"}, "CANN is not found in ASCEND_HOME_PATH=/absent"),
        ("CANN 7.0", "CANN 7.0 in"),
        ("two NPUs", "4 processes, but 2 NPUs are visible"),
        ("MindSpore 2.4.1", "mindspore 2.4.1 is installed, which was never tried here: install"),
    ],
    ids=["no CANN", "no folder", "old CANN", "few NPUs", "old MindSpore"],
)
def test_what_is_missing_for_npus(
    tmp_path: Path, environment: dict[str, str] | str, expected: str
) -> None:
    """Said in one line, before anything is started."""
    pytest.importorskip("mindspore", reason="MindSpore is not installed")
    made = {
        "CANN 7.0": lambda: fake_cann(tmp_path, "7.0", npus=4),
        "two NPUs": lambda: fake_cann(tmp_path, "9.0", npus=2),
        "MindSpore 2.4.1": lambda: fake_version(tmp_path, "mindspore", "2.4.1"),
    }
    if isinstance(environment, str):
        environment = made[environment]()
    out = tmp_path / "run"
    shipped = REPOSITORY / "configs" / "crystal_dit_small_fm.yaml"
    code, output, errors = result(ASCEND, "--worker_num", 4, "--out", out, shipped, **environment)
    assert (code, output) == (2, "")
    lines = errors.splitlines()
    assert lines[0].startswith(f"error: {expected}"), errors
    assert all(line.startswith("error: ") for line in lines)
    assert not [line for line in lines[1:] if "npu-smi" not in line]
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "CONFIG is missing"),
        (("--device", "cuda", "x.yaml"), "--device cuda: give ascend or cpu"),
        (("--join", "yes", "x.yaml"), "--join yes"),
        (("--worker_num", "0", "x.yaml"), "--worker_num 0"),
        (("--worker_num=8", "--local_worker_num=3", "x.yaml"), "a multiple of"),
        (("--local_worker_num", "4", "x.yaml"), "--master_addr"),
        (("--worker_num", "2", "--node_rank", "1", "x.yaml"), "--node_rank 1"),
        (("--master_port", "x", "x.yaml"), "--master_port x"),
        (("--master_port", "65536", "x.yaml"), "--master_port 65536"),
        (("--resume", "x.yaml"), "no option --resume"),
    ],
)
def test_wrong_call_of_the_ascend_script(arguments: tuple[str, ...], expected: str) -> None:
    code, output, errors = result(ASCEND, *arguments)
    assert (code, output) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert expected in errors


def test_port_in_use_is_told_before_processes_start(tmp_path: Path) -> None:
    pytest.importorskip("mindspore", reason="MindSpore is not installed")
    config, out = tmp_path / "run.yaml", tmp_path / "run"
    config.write_text(tiny_run(config).model_dump_json())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        options = ("--worker_num", 2, "--master_port", port, "--out", out)
        code, _, errors = result(ASCEND, *CPU, *options, config)
    assert code == 2
    assert errors.startswith(f"error: port {port} of 127.0.0.1 is in use")
    assert errors.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cuda", "unknown to MindSpore: give cpu or ascend"), ("ascend", "finds no CANN")],
)
def test_wrong_device_without_a_launcher(alike: Rehearsal, device: str, expected: str) -> None:
    if device == "ascend" and ascend_count():
        pytest.skip("there are NPUs")
    out = alike.run.alone.with_name(device)
    command = ["-m", "common", "train", "--backend", "mindspore", "--device", device]
    command = [sys.executable, *command, "--out", str(out), str(alike.run.config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: device '{device}'.*{expected}.*\n", done.stderr)
    assert not out.exists()


def test_help() -> None:
    for script in (GPU, ASCEND):
        code, output, errors = result(script, "--help")
        assert (code, errors) == (0, "")
        assert "CONFIG [KEY=VALUE ...]" in output
        assert output.endswith("at once.\n")
