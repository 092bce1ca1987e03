"""Starting, resuming and replacing runs, before any framework is involved."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ckpt_convert.convert import convert
from common.checkpoint import latest, save_checkpoint, save_step, shipped, shipped_language
from common.cli import run
from common.commands.train import check_start, prepare
from common.config import AnyRunConfig, RunConfig
from common.errors import UserError
from common.files import alone_in
from common.language.config import LanguageRunConfig
from common.training import start_folder

CONFIG = RunConfig(name="example")


def start_run(folder: Path, config: AnyRunConfig = CONFIG) -> None:
    save_step(
        folder,
        10,
        config=config.model_dump(mode="json"),
        model={"w": np.ones(2, dtype=np.float32)},
        optimizer={"m": np.ones(2)},
        state={"step": 10},
    )


def changed(**settings: object) -> RunConfig:
    data = CONFIG.model_dump()
    data["train"] |= settings
    return RunConfig.model_validate(data)


def test_new_run(tmp_path: Path) -> None:
    assert not prepare(tmp_path / "run", CONFIG, None)
    assert not prepare(tmp_path / "run", CONFIG, False)
    assert not (tmp_path / "run").exists()


def test_run_goes_on(tmp_path: Path) -> None:
    start_run(tmp_path / "run")
    assert prepare(tmp_path / "run", CONFIG, None)
    assert prepare(tmp_path / "run", CONFIG, True)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        prepare(tmp_path / "run", CONFIG, True)


@pytest.mark.parametrize(("lora", "told"), [({"rank": 4}, "lora.rank"), (None, "other lora:")])
def test_other_additions(tmp_path: Path, lora: dict[str, int] | None, told: str) -> None:
    def config(additions: dict[str, int] | None) -> LanguageRunConfig:
        train = {"init_from": "base"}
        data = {"name": "example", "kind": "language", "lora": additions, "train": train}
        return LanguageRunConfig.model_validate(data)

    start_run(tmp_path / "run", config({"rank": 8}))
    assert prepare(tmp_path / "run", config({"rank": 8}), None)
    with pytest.raises(UserError, match=told):
        prepare(tmp_path / "run", config(lora), None)


def test_fresh_run_puts_the_old_one_aside(tmp_path: Path) -> None:
    for number in (2, 3):
        start_run(tmp_path / "run")
        assert not prepare(tmp_path / "run", CONFIG, False)
        assert not (tmp_path / "run").exists()
        assert latest(tmp_path / f"run-{number}") is not None


def test_fresh_leaves_a_run_where_it_is_that_still_trains(tmp_path: Path) -> None:
    start_run(tmp_path / "run")
    with (
        alone_in(tmp_path / "run"),
        pytest.raises(UserError, match="another process trains there; give another --out"),
    ):
        prepare(tmp_path / "run", CONFIG, False)
    assert latest(tmp_path / "run") is not None
    assert not prepare(tmp_path / "run", CONFIG, False)
    assert [path.name for path in tmp_path.iterdir()] == ["run-2"]


def test_fresh_leaves_folders_alone_that_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert not prepare(tmp_path, CONFIG, False)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("resume", [None, True])
def test_a_finished_run_without_steps_is_not_lost(tmp_path: Path, resume: bool | None) -> None:
    weights = {"w": np.ones(2, dtype=np.float32)}
    save_checkpoint(tmp_path / "run" / "final", config={"name": "example"}, model=weights)
    with pytest.raises(UserError, match="another --out" if resume is None else "no checkpoint"):
        prepare(tmp_path / "run", CONFIG, resume)
    assert not prepare(tmp_path / "run", CONFIG, False)
    assert [path.name for path in tmp_path.iterdir()] == ["run-2"]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    start_run(tmp_path)
    with pytest.raises(UserError, match=r"other train\.steps, train\.seed: "):
        prepare(tmp_path, changed(steps=5, seed=1), None)


def test_settings_without_influence_may_change(tmp_path: Path) -> None:
    start_run(tmp_path)
    assert prepare(tmp_path, changed(log_every=1, checkpoint_every=2), None)


def test_settings_of_speed_and_memory_may_change(tmp_path: Path) -> None:
    """After memory has run out a run goes on; a setting of its result stays."""
    lora = {"name": "x", "kind": "language", "lora": {}}

    def with_train(**settings: object) -> LanguageRunConfig:
        train = {"init_from": "glm4_tiny"} | settings
        return LanguageRunConfig.model_validate(lora | {"train": train})

    start_run(tmp_path, with_train())
    cheaper = {"gradient_checkpointing": True, "fsdp": True, "compile": True}
    assert prepare(tmp_path, with_train(**cheaper), None)
    with pytest.raises(UserError, match=r"other train\.dropout: "):
        prepare(tmp_path, with_train(dropout=0.5, **cheaper), None)


def test_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("text")
    with pytest.raises(UserError, match="not a folder"):
        prepare(tmp_path / "run", CONFIG, None)


@pytest.mark.parametrize(
    ("variable", "many", "alone"), [("WORLD_SIZE", "2", "1"), ("MS_WORKER_NUM", "1", "0")]
)
def test_one_of_many_processes_puts_nothing_aside(
    variable: str,
    many: str,
    alone: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One worker of msrun has a scheduler beside it."""
    monkeypatch.setenv(variable, many)
    assert run(["train", "absent.yaml", "--fresh"]) == 2
    assert "--fresh" in capsys.readouterr().err
    monkeypatch.setenv(variable, alone)
    assert run(["train", "absent.yaml", "--fresh"]) == 2
    assert "absent.yaml" in capsys.readouterr().err


# Weights to start from


@pytest.mark.parametrize("kind", ["", "kind: language"])
@pytest.mark.parametrize("start", ["runs/absent", "absent"])
def test_absent_weights_are_told_before_data_are_read(
    kind: str,
    start: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Data that are absent, too, would be told otherwise."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    Path("run.yaml").write_text(f"name: x\n{kind}\ntrain: {{data: none.csv, init_from: {start}}}")
    assert run(["train", "run.yaml"]) == 2
    line = capsys.readouterr().err
    assert start in line
    assert "does not exist" in line
    assert not Path("runs/x").exists()


def test_weights_of_another_network_are_told_before_data_are_read() -> None:
    def starting(start: str, **model: object) -> RunConfig:
        data = changed(init_from=start).model_dump()
        data["model"] |= {"precedents": True} | model
        return RunConfig.model_validate(data)

    small = "crystal_dit_small_fm"
    check_start(starting(small))
    check_start(starting(small, properties=["band_gap"], target="difference"))
    line = f"{small} has another network: model.width 128, not 64, model.properties 1, not 2; "
    with pytest.raises(UserError, match=line + "give the configuration"):
        check_start(starting(small, width=64, properties=["band_gap", "formation_energy"]))
    with pytest.raises(UserError, match="is a language model; give a Crystal DiT's"):
        check_start(starting(str(shipped_language()["glm4_tiny"])))


def starting(start: Path | str, **model: object) -> LanguageRunConfig:
    """A run that starts from a language model of the shipped one's sizes, if it says no others."""
    sizes: dict[str, object] = {"layers": 4, "width": 192, "heads": 6, "feed_forward": 512}
    train = {"init_from": str(start)}
    data = {"name": "x", "kind": "language", "model": sizes | model, "train": train}
    return LanguageRunConfig.model_validate(data)


def test_a_language_models_base_is_told_before_data_are_read() -> None:
    check_start(starting("glm4_tiny"))
    check_start(starting("glm4_tiny", positions=256))
    with pytest.raises(UserError, match=r"has another network: model\.layers 4, not 2; give"):
        check_start(starting("glm4_tiny", layers=2))
    with pytest.raises(UserError, match=r"another network: model\.width 192, not 96; give"):
        check_start(starting("glm4_tiny", width=96))
    with pytest.raises(UserError, match="is a Crystal DiT; give a language model's checkpoint"):
        check_start(starting(shipped()["crystal_dit_small_fm"]))


@pytest.mark.parametrize("manifest", [True, False])
def test_a_base_in_mindformers_names_is_told_what_to_do(manifest: bool, tmp_path: Path) -> None:
    """A folder of this project, and one of transformers."""
    base = shutil.copytree(shipped_language()["glm4_tiny"], tmp_path / "base")
    if not manifest:
        (base / "manifest.json").unlink()
    check_start(starting(base))
    convert(base, tmp_path / "ms", "mindspore")
    with pytest.raises(UserError, match=r"or OUT of 'uni-mdm convert .*ms OUT --to torch'"):
        check_start(starting(tmp_path / "ms"))


def test_a_crystal_dit_in_mindspores_files_is_told_what_to_do(tmp_path: Path) -> None:
    convert(shipped()["crystal_dit_small_fm"], tmp_path / "ms", "mindspore")
    told = r"give another folder: what it was converted from, .* OUT --to torch'"
    with pytest.raises(UserError, match=told):
        check_start(changed(init_from=str(tmp_path / "ms")))


def test_weights_of_another_network_in_a_folder_of_transformers(tmp_path: Path) -> None:
    base = shutil.copytree(shipped_language()["glm4_tiny"], tmp_path / "base")
    (base / "manifest.json").unlink()
    arrays = load_file(base / "model.safetensors")
    arrays["extra"] = arrays.pop("lm_head.weight")
    save_file(arrays, base / "model.safetensors")
    with pytest.raises(UserError, match=r"do not belong to its network: extra, lm_head\.weight"):
        check_start(starting(base))


def test_a_shipped_name_is_a_folder_to_start_from() -> None:
    language = {"name": "x", "kind": "language", "train": {"init_from": "glm4_tiny"}}
    (name, folder), *_ = shipped().items()
    assert start_folder(changed(init_from=name)) == folder
    assert (
        start_folder(LanguageRunConfig.model_validate(language)) == shipped_language()["glm4_tiny"]
    )
    assert start_folder(CONFIG) is None
    with pytest.raises(UserError, match=f"'glm4_tiny' does not exist.*{name}"):
        start_folder(changed(init_from="glm4_tiny"))
