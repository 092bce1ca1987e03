"""Settings: the shipped files, the rules between fields, overrides, and what users get wrong."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from common.config import ModelConfig, RunConfig, load_config, parse_as, parse_config
from common.data.batch import PROPERTY_NAMES
from common.errors import UserError
from common.language.config import LanguageRunConfig

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").rglob("crystal_dit_*.yaml"))
CONFIGS += sorted((Path(__file__).resolve().parents[2] / "configs").glob("diffcsp_pp*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def refused(path: Path, *overrides: str) -> str:
    """The one line that a user gets."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_there_are_shipped_files() -> None:
    networks = {f"crystal_dit_{size}_{of}" for size in ("small", "paper") for of in ("fm", "bg")}
    assert networks | {"diffcsp_pp", "diffcsp_pp_small"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_file(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    # What a checkpoint keeps of it is the same configuration.
    kept = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert parse_config(kept, "checkpoint") == config


@pytest.mark.parametrize(
    ("stem", "properties"),
    [
        ("crystal_dit_small_fm", ("formation_energy",)),
        ("crystal_dit_small_bg", ("band_gap",)),
        ("crystal_dit_paper_fm", ("formation_energy",)),
        ("crystal_dit_paper_bg", ("band_gap",)),
        ("diffcsp_pp", ()),
        ("diffcsp_pp_small", ()),
    ],
)
def test_shipped_file_takes_its_property(stem: str, properties: tuple[str, ...]) -> None:
    path = next(path for path in CONFIGS if path.stem == stem)
    assert load_config(path).model.properties == properties


def test_properties_of_a_network_are_those_of_a_batch() -> None:
    assert ModelConfig(properties=PROPERTY_NAMES).properties == PROPERTY_NAMES


def test_defaults_fill_the_rest(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "name: x")) == RunConfig(name="x")


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        RunConfig(name="x").name = "y"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"width": 100, "heads": 8}, "multiple of heads"),
        ({"width": 15, "heads": 3}, "even"),
        ({"cell": "conventional"}, "frames"),
        ({"properties": ["band_gap", "band_gap"]}, "differ"),
        ({"properties": ["hardness"]}, "model.properties.0"),
        ({"layers": 0}, "model.layers"),
        ({"layers": "four"}, "model.layers"),
        ({"depth": 4}, "model.depth"),
        ({"cell": "primitive"}, "model.cell"),
    ],
)
def test_wrong_network(tmp_path: Path, model: dict[str, object], says: str) -> None:
    path = write(tmp_path, yaml.safe_dump({"name": "x", "model": model}))
    message = refused(path)
    assert message.startswith(f"{path}: ")
    assert says in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: {}", "name: is missing"),
        ("name: x\nnetwork: {}", "network: "),
        ("name: x\ntrain: {learning_rate: 0}", "train.learning_rate"),
        ("name: x\ntrain: {learning_rate: .nan}", "train.learning_rate"),
        ("name: x\ntrain: {learning_rate: .inf}", "train.learning_rate"),
        ("name: x\ntrain: {ema: 1.0}", "train.ema"),
        ("name: x\ntrain: {seed: -1}", "train.seed"),
        ("name: x\ntrain: {seed: 2147483648}", "train.seed: 2147483648 must be below 2147483648"),
        ("name: x\ntrain: {precision: float8}", "train.precision"),
        ("name: x\ndiffusion: {kind: ddpm}", "diffusion.kind"),
        ("name: x\ndiffusion: {sigma_min: 0.6}", "diffusion: sigma_min must be below sigma_max"),
        ("name: x\nmodel:\n", "model: "),
        ("name: x\n1: 2", "1: keys must be text"),
        ("[1, 2]", "a mapping"),
        ("", "a mapping"),
        ("name: [x", "not YAML"),
        ("name: 2020-13-45", "not YAML"),
    ],
)
def test_wrong_file(tmp_path: Path, text: str, says: str) -> None:
    assert says.lower() in refused(write(tmp_path, text)).lower()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: {widht: 64}", "model.widht: unknown setting; did you mean width?"),
        ("modle: {}", "modle: unknown setting; did you mean model?"),
        ("ema: 0.5", "ema: unknown setting; did you mean train.ema?"),
        (
            "model: {steps: 5}",
            "model.steps: unknown setting; did you mean diffusion.steps or train.steps?",
        ),
        ("train: {zzzz: 1}", "train.zzzz: unknown setting"),
        ("model: {layers: four}", "model.layers: 'four' must be a whole number"),
        ("model: {layers: null}", "model.layers: null must be a whole number"),
        ("model: {layers: 0}", "model.layers: 0 must be at least 1"),
        ("model: {frames: perhaps}", "model.frames: 'perhaps' must be true or false"),
        ("model: {cell: cubic}", "model.cell: 'cubic' must be 'asymmetric' or 'conventional'"),
        ("model: {properties: band_gap}", "model.properties: 'band_gap' must be a list"),
        ("model: 3", "model: 3 must be a section of settings"),
        ("train: {data: 3}", "train.data: 3 must be text"),
        ("train: {ema: .nan}", "train.ema: nan must be finite"),
        ("train: {ema: little}", "train.ema: 'little' must be a number"),
        ("train: {final_rate: 2}", "train.final_rate: 2 must be at most 1.0"),
        ("train: {clip_norm: -1}", "train.clip_norm: -1 must be above 0.0"),
        (
            "model: {cell: conventional}",
            "model: frames are all alike in the conventional cell: set frames to false",
        ),
    ],
)
def test_what_is_wrong_in_our_words(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, f"name: x\n{text}")
    assert refused(path) == f"{path}: {says}"


def test_settings_of_a_language_model(tmp_path: Path) -> None:
    settings = {"train": {"questions": []}, "lora": {"targets": ["up_proj"], "alhpa": 1}}
    with pytest.raises(UserError) as caught:
        parse_as(LanguageRunConfig, settings | {"name": "x", "kind": "language"}, "run.yaml")
    assert str(caught.value).removeprefix("run.yaml: ").split("; lora.") == [
        "train.questions: [] must be a list with at least one entry",
        "targets.0: 'up_proj' must be 'q_proj', 'k_proj', 'v_proj' or 'o_proj'",
        "alhpa: unknown setting; did you mean alpha?",
    ]


def test_every_wrong_setting_is_named(tmp_path: Path) -> None:
    message = refused(write(tmp_path, "name: x\nmodel: {layers: 0}\ntrain: {steps: 0, typo: 1}"))
    assert all(name in message for name in ("model.layers", "train.steps", "train.typo"))


def test_unreadable_files(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "absent.yaml")
    assert "directory" in refused(tmp_path)
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"name: \xff\xfe")
    assert "not YAML" in refused(path)


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\nmodel: {layers: 3, width: 64}")
    config = load_config(
        path,
        (
            "name=y",
            "model.layers=5",
            "train.learning_rate=2.0e-4",
            "train.init_from=a=b",
            "train.compile=true",
            "model.properties=[band_gap]",
        ),
    )
    assert config.name == "y"
    assert (config.model.layers, config.model.width) == (5, 64)
    assert config.train.learning_rate == 2e-4
    assert config.train.init_from == "a=b"
    assert config.train.compile
    assert config.model.properties == ("band_gap",)
    assert load_config(path, ("model.layers=1", "model.layers=2")).model.layers == 2
    assert load_config(path).model.layers == 3


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.layers", "section.key=value"),
        ("=3", "section.key=value"),
        ("name.first=3", "'name' is no section"),
        ("model.depth=3", "model.depth"),
        ("models.layers=3", "models"),
        ("model.layers=0", "model.layers"),
        ("model.layers=[", "not YAML"),
        ("train.data=2020-13-45", "not YAML"),
        ("train.=3", "train."),
        ("model.frames=true", "frames"),
    ],
)
def test_wrong_override(tmp_path: Path, override: str, says: str) -> None:
    path = write(tmp_path, "name: x\nmodel: {cell: conventional, frames: false}")
    assert says in refused(path, override)


@pytest.mark.parametrize("setting", [{"target": "difference"}, {"former_elements": True}])
def test_what_is_said_of_precedents_needs_them(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="need precedents: true"):
        ModelConfig.model_validate(setting)
    assert ModelConfig.model_validate({"precedents": True} | setting).precedents
