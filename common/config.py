"""Every setting of a run, as frozen models of the YAML files in ``configs/``."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.data.batch import PROPERTY_NAMES
from common.errors import UserError

#: Settings of `train` that torch alone heeds; MindSpore, which reads the same files, says so.
TORCH_ONLY = ("compile", "fsdp")

PropertyName = Literal["band_gap", "formation_energy"]


class Settings(BaseModel):
    """Base of all settings: nothing unknown, nothing changed later."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Settings):
    """The Crystal DiT."""

    cell: Literal["asymmetric", "conventional"] = Field(
        "asymmetric", description="One token per site, or per atom of the conventional cell."
    )
    layers: int = Field(4, ge=1, description="Blocks.")
    width: int = Field(128, ge=8, description="Width of a token.")
    edge_width: int = Field(96, ge=8, description="Width of an edge's geometry.")
    heads: int = Field(8, ge=1, description="Attention heads, of edges and of the crystal.")
    feed_forward: int = Field(
        2, ge=0, description="Feed-forward width over token width; 0 leaves that part out."
    )
    modulation: bool = Field(
        True, description="Time, space group and property act on every norm; else on the input."
    )
    frequencies: int = Field(8, ge=1, description="Fourier frequencies per axis, eq. 6.")
    frames: bool = Field(True, description="Edges are seen from both atoms' frames.")
    distances: bool = Field(True, description="Edges know distances to the nearest images (A).")
    attention: bool = Field(True, description="Crystal multi-head attention, eqs. 8 and 9.")
    aggregation: Literal["softmax", "mean"] = Field(
        "softmax", description="Weights of the edges in the sum of eq. 7."
    )
    precedents: bool = Field(
        False, description="Starts from, and sees, the most similar known crystal (flow)."
    )
    former_elements: bool = Field(
        False, description="Sites see which element the precedent had there."
    )
    target: Literal["velocity", "difference"] = Field(
        "velocity",
        description="Said of a crystal with a precedent: how fast it moves, or where it differs.",
    )
    properties: tuple[PropertyName, ...] = Field(
        ("formation_energy",), description="Properties that condition the network."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width % self.heads or self.width % 2:
            raise ValueError("width must be even and a multiple of heads")
        if self.cell == "conventional" and self.frames:
            raise ValueError("frames are all alike in the conventional cell: set frames to false")
        if not self.precedents and (self.former_elements or self.target == "difference"):
            raise ValueError("target: difference and former_elements need precedents: true")
        if len(set(self.properties)) != len(self.properties):
            raise ValueError(f"properties must differ; known: {', '.join(PROPERTY_NAMES)}")
        return self


class DiffusionConfig(Settings):
    """What is learned, and how it is sampled."""

    kind: Literal["flow", "score"] = Field(
        "flow", description="Flow matching, or DiffCSP++'s score matching and DDPM."
    )
    origin_tries: int = Field(
        4, ge=1, description="Origins tried for the description nearest to the noise (flow)."
    )
    timesteps: int = Field(1000, ge=2, description="Noise levels T (score).")
    sigma_min: float = Field(0.005, gt=0, description="Smallest sigma, in cells (score).")
    sigma_max: float = Field(0.5, gt=0, description="Largest sigma, in cells (score).")
    coordinate_weight: float = Field(1.0, gt=0, description="Weight of the coordinate loss.")
    lattice_weight: float = Field(0.5, gt=0, description="Weight of the lattice loss.")
    precedent_bend: float | None = Field(
        None, gt=0, description="Errors beyond so many units count linearly, with a precedent."
    )
    steps: int = Field(50, ge=1, description="Network calls per sample (flow).")
    step_lr: float = Field(1e-5, gt=0, description="Langevin step of the corrector (score).")
    velocity_boost: float = Field(
        0.0, ge=0, description="Speeds coordinates up by 1 + boost * t (flow), as in FlowMM."
    )
    precedent_noise: float = Field(
        0.05, gt=0, description="Added to a precedent's coordinates, in cells."
    )
    precedent_lattice_noise: float = Field(
        0.3, gt=0, description="Added to its standardised lattice numbers."
    )
    precedent_temperature: float = Field(
        0.4, ge=0, le=1, description="Share of both noises that sampling adds."
    )
    precedents_in_turn: int = Field(
        1, ge=1, description="Known crystals that the samples of a request start from in turn."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError("sigma_min must be below sigma_max")
        return self


class Optimisation(Settings):
    """What every training has, of whatever network."""

    data: str = Field("train", description="Known data set, CSV or Parquet; several with a +.")
    validation: str = Field("val", description="Likewise; only its loss is watched.")
    validation_rows: int = Field(1024, ge=1, description="Rows of it, the first ones.")
    validation_every: int = Field(1000, ge=1, description="Steps between validations.")
    steps: int = Field(12000, ge=1, description="Optimiser steps.")
    learning_rate: float = Field(1e-3, gt=0)
    warmup: int = Field(300, ge=0, description="Steps of linear warm-up.")
    final_rate: float = Field(0.01, ge=0, le=1, description="Cosine end over peak rate.")
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    ema: float = Field(0.999, ge=0, lt=1, description="Decay of the averaged weights.")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of products of matrices; the loss is scaled in float16."
    )
    compile: bool = Field(False, description="torch.compile where most of the time goes (torch).")
    init_from: str | None = Field(None, description="Folder or name of a checkpoint to start from.")
    checkpoint_every: int = Field(1000, ge=1, description="Steps between checkpoints.")
    log_every: int = Field(50, ge=1, description="Steps between lines of the log.")
    seed: int = Field(0, ge=0, lt=2**31, description="Below 2**31, as all frameworks take.")


class TrainConfig(Optimisation):
    """Optimisation of the Crystal DiT."""

    batch_size: int = Field(256, ge=1, description="Crystals in a batch, at most.")
    edge_budget: int = Field(16384, ge=64, description="Padded edges in a batch, at most.")
    property_dropout: float = Field(0.1, ge=0, le=1, description="Rows trained without property.")
    precedents: int = Field(
        1, ge=1, description="Known crystals that every row is trained with, the most similar ones."
    )
    precedent_dropout: float = Field(
        0.15, ge=0, le=1, description="Rows trained without precedent, where there is one."
    )
    at_precedent: float = Field(
        0.0, ge=0, lt=1, description="Share of rows with a precedent shown where paths begin."
    )
    descriptions: Literal["nearest", "random"] = Field(
        "nearest",
        description="Of a crystal with its precedent: the known crystal's own, or a random one.",
    )


class AnyRunConfig(Settings):
    """One run, of whatever network."""

    name: str = Field(description="Of the run and of its checkpoint.")
    train: Optimisation = Optimisation()


class RunConfig(AnyRunConfig):
    """One run of the Crystal DiT: network, diffusion, training."""

    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model.precedents and self.diffusion.kind != "flow":
            raise ValueError("model.precedents: only a flow starts from them")
        return self


AnyRun = TypeVar("AnyRun", bound=AnyRunConfig)


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Reads the YAML of a run of the Crystal DiT.

    Args:
        path: the file.
        overrides: ``section.key=value``, the value as YAML.

    Raises:
        UserError: if the file cannot be read, or a setting is unknown or out of its range.
    """
    return parse_config(read_settings(path, overrides), str(path))


def read_settings(path: Path, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings of a file, unchecked; arguments and errors as in `load_config`."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no text, or an impossible date
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: a mapping of settings is expected")
    for override in overrides:
        _apply_override(data, override)
    return data


def parse_config(data: dict[str, Any], where: str) -> RunConfig:
    """Checks the settings of a run of the Crystal DiT; errors as in `parse_as`."""
    return parse_as(RunConfig, data, where)


def parse_as(kind: type[AnyRun], data: dict[str, Any], where: str) -> AnyRun:
    """Checks a run's settings; UserError names every wrong one and where it stands."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        # A list of wrong entries alone is not too short.
        found = [e for e in error.errors() if e["type"] != "too_short" or not e["input"]]
        problems = "; ".join(_in_words(kind, item) for item in found)
        raise UserError(f"{where}: {problems}") from error


def _in_words(kind: type[AnyRunConfig], item: Any) -> str:
    """One of pydantic's errors as ``section.key: what is wrong``."""
    path = [str(part) for part in item["loc"]]
    name = ".".join(path) or "settings"
    match item["type"]:
        case "extra_forbidden":
            return f"{name}: unknown setting{_meant(kind, path)}"
        case "missing":
            return f"{name}: is missing"
        case "invalid_key":
            return f"{name}: keys must be text"
        case "value_error":
            return f"{name}: {item['ctx']['error']}"
    limits = item.get("ctx", {})
    expected = next(
        (text.format(**limits) for start, text in _EXPECTED if item["type"].startswith(start)),
        str(item["msg"]),
    )
    value = "null" if item["input"] is None else repr(item["input"])
    shown = value if len(value) <= 40 else f"{value[:37]}..."
    return f"{name}: {shown} must be {expected}"


#: How pydantic's types of errors begin, and what is expected there.
_EXPECTED = (
    ("literal_error", "{expected}"),
    ("greater_than_equal", "at least {ge}"),
    ("greater_than", "above {gt}"),
    ("less_than_equal", "at most {le}"),
    ("less_than", "below {lt}"),
    ("finite_number", "finite"),
    ("int_", "a whole number"),
    ("float_", "a number"),
    ("bool_", "true or false"),
    ("string_", "text"),
    ("tuple_", "a list"),
    ("too_short", "a list with at least one entry"),
    ("model_", "a section of settings"),
    ("dict_", "a section of settings"),
)


def _meant(kind: type[AnyRunConfig], path: list[str]) -> str:
    """The known setting with nearly the same name, or with the same name in another section."""
    *section, wrong = path
    known = [[name] for name in kind.model_fields]
    for name, field in kind.model_fields.items():
        for model in (field.annotation, *get_args(field.annotation)):
            if isinstance(model, type) and issubclass(model, Settings):
                known += [[name, inner] for inner in model.model_fields]
    here = [setting[-1] for setting in known if setting[:-1] == section]
    found = get_close_matches(wrong, here, n=1)
    found = found or sorted(".".join(other) for other in known if other[-1] == wrong)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UserError(f"override '{override}': write section.key=value")
    *sections, name = key.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise UserError(f"override '{override}': '{section}' is no section")
    try:
        data[name] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"override '{override}': the value is not YAML") from error
