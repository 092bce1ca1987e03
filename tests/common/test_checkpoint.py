"""Checkpoints survive kills and full disks, and every kind of damage is reported in one line."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save

from common.checkpoint import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    Layout,
    install,
    latest,
    load_checkpoint,
    provenance_of,
    save_checkpoint,
    save_step,
    verify,
    write_card,
)
from common.errors import UserError

CONFIG = {"width": 8, "learning_rate": 1e-5, "cell": "asymmetric", "warm_up": None, "steps": [1, 2]}
FILES = ["config.yaml", "model.safetensors", "optimizer.safetensors", "state.json", "README.md"]


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "blocks.0.weight": generator.normal(size=(4, 3)).astype(np.float32),
        "blocks.0.bias": np.array(seed, dtype=np.float32),
        "transposed": generator.normal(size=(5, 2)).astype(np.float32).T,
        "empty": np.zeros((0, 3), dtype=np.float32),
    }


def save_example(folder: Path, seed: int = 0, **changes: object) -> None:
    arguments: dict = {
        "config": CONFIG,
        "model": weights(seed),
        "card": "# Card\n",
        "optimizer": {"step": np.array(seed), "moment": np.ones(3)},
        "state": {"step": seed},
        "fingerprint": "f" * 64,
        "extra": {"command": "train"},
    }
    save_checkpoint(folder, **(arguments | changes))


def rewrite_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the manifest, hashes of files and its own digest made to agree again."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["manifest_sha256"]
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        manifest["files"][name] = {"size": len(data), "sha256": digest}
    change(manifest)
    canonical = json.dumps(manifest, sort_keys=True).encode()
    manifest["manifest_sha256"] = hashlib.sha256(canonical).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def error_of(folder: Path, **options: bool) -> str:
    with pytest.raises(UserError) as caught:
        load_checkpoint(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert ";" in message, "says what to do"
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_example(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_round_trip(folder: Path) -> None:
    checkpoint = load_checkpoint(folder, optimizer=True)
    assert checkpoint.path == folder
    assert checkpoint.config == CONFIG
    assert checkpoint.state == {"step": 0}
    assert checkpoint.fingerprint == "f" * 64
    assert checkpoint.manifest["extra"] == {"command": "train"}
    assert checkpoint.manifest["versions"]["numpy"] == np.__version__
    assert checkpoint.model.keys() == weights().keys()
    for name, expected in weights().items():
        assert checkpoint.model[name].shape == expected.shape
        np.testing.assert_array_equal(checkpoint.model[name], expected)
    assert checkpoint.optimizer is not None
    assert checkpoint.optimizer["step"].dtype == np.int64
    np.testing.assert_array_equal(checkpoint.optimizer["moment"], np.ones(3))


def test_other_programs_can_read_the_files(folder: Path) -> None:
    assert yaml.safe_load((folder / "config.yaml").read_text()) == CONFIG
    tensors = load_file(folder / MODEL)
    np.testing.assert_array_equal(tensors["transposed"], weights()["transposed"])
    listing = subprocess.run(
        ["sha256sum", MODEL], cwd=folder, capture_output=True, text=True, check=True
    )
    digest = listing.stdout.split()[0]
    assert json.loads((folder / MANIFEST).read_text())["files"][MODEL]["sha256"] == digest
    assert load_checkpoint(folder).hash == digest[:12]


def test_same_content_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    reordered = dict(reversed(weights().items()))
    save_example(tmp_path / "again", model=reordered)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_hash_follows_the_weights_only(folder: Path, tmp_path: Path) -> None:
    save_example(tmp_path / "other_card", card="other", state={"step": 9})
    save_example(tmp_path / "other_weights", seed=1)
    reference = load_checkpoint(folder).hash
    assert load_checkpoint(tmp_path / "other_card").hash == reference
    assert load_checkpoint(tmp_path / "other_weights").hash != reference


def test_replaces_the_old_checkpoint_and_leaves_nothing_else(folder: Path) -> None:
    save_example(folder, seed=1, optimizer=None, state=None)
    checkpoint = load_checkpoint(folder)
    np.testing.assert_array_equal(checkpoint.model["blocks.0.bias"], 1)
    assert checkpoint.state is None
    assert not (folder / OPTIMIZER).exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_card_alone_can_be_replaced(folder: Path) -> None:
    before = load_checkpoint(folder, optimizer=True)
    write_card(folder, "# Better\n")
    after = load_checkpoint(folder, optimizer=True)
    assert (folder / "README.md").read_text() == "# Better\n"
    assert after.hash == before.hash
    assert after.state == before.state
    assert after.manifest["versions"] == before.manifest["versions"]


def test_will_not_replace_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("text")
    for name in ("thesis", "file"):
        with pytest.raises(UserError, match="something else"):
            save_example(tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "text"


def test_diverged_weights_are_not_saved(folder: Path) -> None:
    diverged = weights()
    diverged["blocks.0.weight"][1, 1] = np.nan
    with pytest.raises(UserError, match=r"'blocks\.0\.weight' has NaN"):
        save_example(folder, model=diverged)
    np.testing.assert_array_equal(
        load_checkpoint(folder).model["transposed"], weights()["transposed"]
    )


def test_weights_must_be_float32(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="float64"):
        save_example(tmp_path / "checkpoint", model={"w": np.ones(2)})


# Damage


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in error_of(folder, optimizer=True)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_truncated_file(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    for length in (0, 1, len(data) // 2, len(data) - 2):
        (folder / name).write_bytes(data[:length])
        assert name in error_of(folder, optimizer=True)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        (folder / name).write_bytes(flipped)
        assert name in error_of(folder, optimizer=True)


def test_flipped_bytes_of_the_manifest(folder: Path) -> None:
    data = (folder / MANIFEST).read_bytes()
    meaning = json.loads(data)
    unchanged = 0
    for position in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        (folder / MANIFEST).write_bytes(flipped)
        try:
            same = json.loads(flipped) == meaning
        except ValueError:
            same = False
        if same:
            unchanged += 1
        else:
            error_of(folder, optimizer=True)
    assert unchanged < len(data) / 10, "only white space may change unseen"


def test_unread_optimizer_need_not_be_whole(folder: Path) -> None:
    (folder / OPTIMIZER).write_bytes(b"")
    assert load_checkpoint(folder).optimizer is None


def test_no_optimizer_to_resume_from(folder: Path) -> None:
    save_example(folder, optimizer=None)
    assert "no optimizer" in error_of(folder, optimizer=True)


def test_not_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    assert "does not exist" in error_of(tmp_path / "absent")
    assert "not a folder" in error_of(folder / MODEL)
    (tmp_path / "empty").mkdir()
    assert MANIFEST in error_of(tmp_path / "empty")


def test_unknown_format(folder: Path) -> None:
    rewrite_manifest(folder, lambda manifest: manifest.update(format_version=2))
    assert "format version 2" in error_of(folder)
    rewrite_manifest(folder, lambda manifest: manifest.update(format="cake recipe"))
    assert "not of a uni-mdm checkpoint" in error_of(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest["files"].pop(MODEL),
        lambda manifest: manifest["files"].update({"../secret": manifest["files"][MODEL]}),
        lambda manifest: manifest["files"].update({MODEL: 3}),
        lambda manifest: manifest["files"][MODEL].update(size="long"),
        lambda manifest: manifest.pop("training_fingerprint"),
    ],
)
def test_malformed_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    rewrite_manifest(folder, change)
    assert "manifest.json is damaged" in error_of(folder)


@pytest.mark.parametrize(
    "text",
    ["a: [1, 2", "- just\n- a list", "", "!!python/object/apply:os.getcwd []", "d: 2024-99-99"],
)
def test_bad_yaml_with_agreeing_hash(folder: Path, text: str) -> None:
    (folder / "config.yaml").write_text(text)
    rewrite_manifest(folder, lambda manifest: None)
    assert "config.yaml" in error_of(folder)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_bad_state_with_agreeing_hash(folder: Path, text: str) -> None:
    (folder / "state.json").write_text(text)
    rewrite_manifest(folder, lambda manifest: None)
    assert "state.json" in error_of(folder)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (save({"w": np.array([1, np.inf], dtype=np.float32)}), "'w' has NaN or infinite"),
        (save({"w": np.ones(2)}), "'w' is float64"),
        (pickle.dumps({"w": [1.0]}), "not readable"),
        (b"\xff" * 64, "not readable"),
        (b"", "not readable"),
    ],
)
def test_bad_tensors_with_agreeing_hash(folder: Path, data: bytes, expected: str) -> None:
    (folder / MODEL).write_bytes(data)
    rewrite_manifest(folder, lambda manifest: None)
    assert expected in error_of(folder)


# Runs


def save_run(run: Path, steps: list[int], keep: int = 2) -> None:
    for step in steps:
        save_step(run, step, keep=keep, config=CONFIG, model=weights(step), state={"step": step})


def step_names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_run_keeps_the_last_steps(tmp_path: Path) -> None:
    save_run(tmp_path, [1, 20, 300, 4000])
    assert step_names(tmp_path) == ["latest", "step_00000300", "step_00004000"]
    assert latest(tmp_path) == tmp_path / "step_00004000"
    assert load_checkpoint(tmp_path).state == {"step": 4000}


def test_steps_of_a_longer_run_are_not_deleted(tmp_path: Path) -> None:
    save_run(tmp_path, [100, 200])
    save_run(tmp_path, [10, 20], keep=1)
    assert step_names(tmp_path) == ["latest", *(f"step_{n:08d}" for n in (20, 100, 200))]
    assert load_checkpoint(tmp_path).state == {"step": 20}


def test_step_can_be_saved_again(tmp_path: Path) -> None:
    save_run(tmp_path, [5, 6, 6])
    assert step_names(tmp_path) == ["latest", "step_00000005", "step_00000006"]


def test_no_step_yet(tmp_path: Path) -> None:
    assert latest(tmp_path / "absent") is None
    assert latest(tmp_path) is None


@pytest.mark.parametrize("pointer", [None, "", "step_00000009", "../step_00000001", "\udcff"])
def test_unusable_pointer_falls_back_to_the_highest_step(
    tmp_path: Path, pointer: str | None
) -> None:
    save_run(tmp_path, [1, 2])
    if pointer is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_bytes(os.fsencode(pointer))
    assert latest(tmp_path) == tmp_path / "step_00000002"


def test_damaged_step_is_reported_and_deleting_it_falls_back(tmp_path: Path) -> None:
    save_run(tmp_path, [1, 2])
    (tmp_path / "step_00000002" / MODEL).write_bytes(b"")
    assert "step_00000002" in error_of(tmp_path)
    for path in (tmp_path / "step_00000002").iterdir():
        path.unlink()
    (tmp_path / "step_00000002").rmdir()
    assert load_checkpoint(tmp_path).state == {"step": 1}


# Kills and full disks: real ones, in processes of their own

_SAVE = """
import os, resource, signal, sys
from pathlib import Path
import numpy as np
from common.checkpoint import load_checkpoint, save_checkpoint, save_step
from common.errors import UserError

folder, kind = Path(sys.argv[1]), sys.argv[2]

def save(number):
    content = {
        "config": {"number": number},
        "model": {"w": np.full(20_000, number, dtype=np.float32)},
        "state": {"number": number},
    }
    if kind == "run":
        save_step(folder, number, keep=1, **content)
    elif kind == "step again":
        save_step(folder, 7, keep=1, **content)
    else:
        save_checkpoint(folder, **content)

def number():
    checkpoint = load_checkpoint(folder)
    assert checkpoint.config == checkpoint.state
    assert (checkpoint.model["w"] == checkpoint.state["number"]).all()
    for step in folder.glob("step_*"):
        load_checkpoint(step)
    return checkpoint.state["number"]
"""

_KILL_AT_EVERY_OPERATION = (
    _SAVE
    + """
WATCHED = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "shutil.rmtree"}

def killed(operation, new):
    # Whether the save of `new` died, right before the given file operation.
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    seen = 0
    def count(event, arguments):
        nonlocal seen
        if event in WATCHED:
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    save(new)
    os._exit(0)

save(1)
current, operation = 1, 1
while killed(operation, current + 1):
    found = number()
    assert found in (current, current + 1), (operation, current, found)
    current, operation = found, operation + 1
assert number() == current + 1
save(current + 2)
assert number() == current + 2
print(operation - 1, len(list(folder.parent.iterdir())))
"""
)

_KILL_AT_RANDOM = (
    _SAVE
    + """
import itertools, random, time
save(1)
start = time.perf_counter()
save(2)
duration = time.perf_counter() - start
current, kills = 2, 0
for round in range(20):
    saved, report = os.pipe()
    child = os.fork()
    if not child:
        for new in itertools.count(current + 1):
            save(new)
            os.write(report, b".")
    os.close(report)
    certain = round % 2 and len(os.read(saved, 1))
    time.sleep(random.Random(round).uniform(0, 3 * duration))
    os.kill(child, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    found = number()
    assert found >= current + certain, (current, found)
    current = found
    os.close(saved)
print(kills, current)
"""
)

_FILE_SIZE_LIMIT = (
    _SAVE
    + """
save(1)
before = sorted(str(path) for path in folder.parent.rglob("*"))
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    save(2)
except UserError as error:
    print(error)
assert number() == 1
assert sorted(str(path) for path in folder.parent.rglob("*")) == before
"""
)


def run_script(script: str, *arguments: str) -> list[str]:
    finished = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


@pytest.mark.parametrize("kind", ["checkpoint", "run", "step again"])
def test_killed_before_any_file_operation(tmp_path: Path, kind: str) -> None:
    (line,) = run_script(_KILL_AT_EVERY_OPERATION, str(tmp_path / "folder"), kind)
    operations, siblings = map(int, line.split())
    assert operations > 10, "the kills took place"
    assert siblings == 1, "the next save cleans up"


@pytest.mark.parametrize("kind", ["checkpoint", "run"])
def test_killed_at_random(tmp_path: Path, kind: str) -> None:
    (line,) = run_script(_KILL_AT_RANDOM, str(tmp_path / "folder"), kind)
    kills, last = map(int, line.split())
    assert kills == 20
    assert last >= 12, "in every second round a save succeeded"


@pytest.mark.parametrize("kind", ["checkpoint", "run"])
def test_file_cannot_be_written_whole(tmp_path: Path, kind: str) -> None:
    (line,) = run_script(_FILE_SIZE_LIMIT, str(tmp_path / "folder"), kind)
    assert line.startswith(f"cannot write checkpoint {tmp_path}/folder")
    assert "File too large" in line


# Verified without being loaded, and other kinds of folders


@pytest.mark.parametrize("name", FILES)
def test_verify_looks_at_every_file(folder: Path, name: str) -> None:
    assert verify(folder) == (folder, load_checkpoint(folder).manifest)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        verify(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"lacks {name}"):
        verify(folder)


def test_another_kind_of_folder_has_its_own_files(folder: Path) -> None:
    other = Layout("recipes", "cakes.bin", "ovens.bin")
    manifest = load_checkpoint(folder).manifest
    files = {"config.yaml": b"a: 1\n", "cakes.bin": lambda path: path.write_bytes(b"x" * 5)}
    target = folder.with_name("other")
    install(target, files | {"README.md": b""}, provenance_of(manifest), other)
    found = verify(target, other)[1]
    assert found["files"]["cakes.bin"]["size"] == 5
    assert provenance_of(found) == provenance_of(manifest)
    assert "is not of a uni-mdm checkpoint" in error_of(target)
    with pytest.raises(UserError, match="is not of a recipes"):
        verify(folder, other)


def test_what_another_process_saves_beside_it_stays(tmp_path: Path) -> None:
    beside = tmp_path / ".mine.v2.0123456789ab.tmp"  # of mine.v2
    left = [tmp_path / f".mine{part}.0123456789ab.tmp" for part in ("", ".previous")]
    for folder in (beside, *left):
        folder.mkdir()
    save_checkpoint(tmp_path / "mine", config={}, model={"w": np.ones(2, dtype=np.float32)})
    assert sorted(tmp_path.iterdir()) == [beside, tmp_path / "mine"]
