"""From a formula and a property to crystals: rank symmetries, sample, choose, describe.

Knows no framework: what samples is a backend, see ``common.backend``. ``generate`` is the one call;
``common.runs`` writes what it returns.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pymatgen.core import Element, Structure

from common.backend import (
    Generator,
    SampleRequest,
    backend_name,
    load_generator,
)
from common.checkpoint import checkpoint_folder, load_checkpoint, shipped
from common.composition import (
    MAX_GIVEN_ATOMS,
    Formula,
    SiteRequest,
    check_positions,
    check_sites,
    parse_formula,
    parse_sites,
)
from common.crystal.structure import Crystal
from common.crystal.symbols import parse_space_group
from common.crystal.wyckoff import wyckoff_summary
from common.errors import UserError
from common.machine import one_thread
from common.properties import TARGETS
from common.ranking import Ranker, load_ranker, model_folder, rank_symmetries
from common.selection import Choice, choose_sample

if TYPE_CHECKING:
    from common.evaluate.validity import ClosePair
    from common.prior import SymmetryCandidate, TemplatePrior
    from common.reference import Nearest

DEFAULT_SAMPLES = 8
#: Atoms nearer than this share of the sum of their covalent radii are said to be close. In MP-20's
#: training and validation rows none are: the smallest share is 0.62.
CLOSE = 0.6
#: Relative difference from the volume per atom of a known crystal, on the same sites, that is said.
OTHER_VOLUME = 0.2
_LIMITS = {"top": (1, 100), "num_samples": (1, 256), "seed": (0, 2**31 - 1), "steps": (1, 10_000)}

#: Called with what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Query:
    """One checked request.

    Attributes:
        formula: what to make.
        properties: ``band_gap`` (eV) or ``formation_energy`` (eV/atom); at most one.
        space_group, sites, z: what is fixed of the symmetry; z is formula units in the
            conventional cell.
        name: what the user calls it.
        note: what the user should know of it, in one line.
        asked: the formula as the user wrote it, where ours is another text; empty if it is not.
    """

    formula: Formula
    properties: dict[str, float] = field(default_factory=dict)
    space_group: int | None = None
    sites: tuple[SiteRequest, ...] | None = None
    z: int | None = None
    name: str = ""
    note: str = field(default="", compare=False)
    asked: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; equal queries give equal dictionaries."""
        return {
            "name": self.name,
            "formula": self.formula.text,
            "asked": self.asked or None,
            "formula_units": self.formula.units if self.formula.units > 1 else None,
            **{name: self.properties.get(name) for name in TARGETS},
            "space_group": self.space_group,
            "sites": " ".join(map(str, self.sites)) if self.sites else None,
            "z": self.z,
        }


@dataclass(frozen=True)
class Settings:
    """How queries are answered.

    Attributes:
        top: symmetries per query.
        num_samples: crystals sampled for each symmetry, of which one is chosen.
        seed: of all noise.
        steps: network calls per crystal; the checkpoint's own number without it.
    """

    top: int = 5
    num_samples: int = DEFAULT_SAMPLES
    seed: int = 0
    steps: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if name == "steps" and value is None:
                continue
            object.__setattr__(self, name, _whole(name, value))
            if not low <= value <= high:
                raise UserError(f"{name} is {value}: give {low} to {high}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {name: getattr(self, name) for name in ("top", "num_samples", "seed", "steps")}


@dataclass(frozen=True, eq=False)
class GeneratedCrystal:
    """A crystal and where it comes from.

    Attributes:
        rank: 1 is the most probable symmetry of the query.
        structure: conventional cell.
        crystal: the same as group, sites and free variables.
        symmetry: the candidate it was sampled for, with its probability.
        query, settings: what was asked.
        choice: which sample this is, and why it was chosen.
        checkpoint: name and hash of the network's weights.
        nearest: the training structure most like it, None if none is within tolerance.
        found_groups: space group by program, at symprec 0.01 A.
        composition_exact: whether the cell holds exactly z formula units.
        min_distance: between two atoms, A.
        density: g/cm^3.
        warnings: what to be careful about.
    """

    rank: int
    structure: Structure
    crystal: Crystal
    symmetry: "SymmetryCandidate"
    query: Query
    settings: Settings
    choice: Choice
    checkpoint: dict[str, str]
    nearest: "Nearest | None"
    found_groups: dict[str, int]
    composition_exact: bool
    min_distance: float
    density: float
    warnings: tuple[str, ...] = ()

    @property
    def formula(self) -> str:
        """Reduced formula."""
        return self.query.formula.text

    @property
    def symbol(self) -> str:
        """Short symbol of the requested space group."""
        return wyckoff_summary(self.crystal.space_group).symbol

    @property
    def name(self) -> str:
        """File name without suffix: rank, formula, space group."""
        return f"{self.rank:02d}_{self.formula}_{self.crystal.space_group}"

    def to_cif(self) -> str:
        """Symmetrised CIF."""
        return self.crystal.to_cif(self.name)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        lattice = self.structure.lattice
        return {
            "rank": self.rank,
            "formula": self.formula,
            "space_group": self.crystal.space_group,
            "space_group_symbol": self.symbol,
            "sites": self.crystal.sites_string,
            "z": self.symmetry.z,
            "probability": self.symmetry.probability,
            "symmetry_source": self.symmetry.source,
            "num_atoms": self.crystal.num_atoms,
            "num_atoms_primitive": self.crystal.num_primitive_atoms,
            "num_free_coords": self.crystal.num_free_coords,
            "lattice_abc": [round(x, 6) for x in lattice.abc],
            "lattice_angles": [round(x, 6) for x in lattice.angles],
            "volume": round(lattice.volume, 6),
            "density": round(self.density, 6),
            "min_distance": round(self.min_distance, 6),
            "composition_exact": self.composition_exact,
            "found_space_groups": self.found_groups,
            "nearest": None if self.nearest is None else self.nearest.to_dict(),
            "choice": self.choice.to_dict(),
            "warnings": list(self.warnings),
            "query": self.query.to_dict(),
            "settings": self.settings.to_dict(),
            "checkpoint": self.checkpoint,
            "crystal": self.crystal.to_dict(),
        }


def make_query(
    formula: str,
    band_gap: float | None = None,
    formation_energy: float | None = None,
    *,
    space_group: int | str | None = None,
    sites: str | None = None,
    z: int | None = None,
    name: str = "",
) -> Query:
    """Checks one request; the arguments are those of ``generate``.

    Raises:
        UserError: if the formula or the sites cannot be read, both properties are given, a number
            is not finite or out of its range, or the sites do not fit the formula and the group.
    """
    parsed = parse_formula(formula)
    properties = {
        key: _checked_property(key, value)
        for key, value in (("band_gap", band_gap), ("formation_energy", formation_energy))
        if value is not None
    }
    if len(properties) > 1:
        raise UserError("give band gap or formation energy, not both: a network knows one of them")
    group, note = None, ""
    if space_group is not None:
        if not isinstance(space_group, str):
            space_group = str(_whole("space group", space_group))
        group, note = parse_space_group(space_group)
    if z is not None:
        z = _whole("z", z)
        if z < 1:
            raise UserError(
                f"z is {z}: give a positive number of formula units per conventional cell"
            )
    if sites is not None and not isinstance(sites, str):
        raise UserError(f'sites are {sites!r}: give text, as in "Sr:1a Ti:1b O:3c"')
    requested = None if sites is None else parse_sites(sites)
    written = formula.strip()
    asked = "" if written == parsed.text else written
    if z is not None and parsed.doubled:
        counted = f"z = {z} counts {parsed.text}, not {written}"
        note = f"{note}; {counted}" if note else counted
    query = Query(parsed, properties, group, requested, z, name, note, asked)
    _check_symmetry(query)
    return query


def _whole(name: str, value: Any) -> int:
    """A whole number of whatever type, as Python's own."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise UserError(f"{name} is {value!r}: give a whole number")
    return int(value)


def _checked_property(name: str, value: float) -> float:
    unit, low, high = TARGETS[name]
    label = name.replace("_", " ")
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise UserError(f"{label} is {value!r}: give a number ({unit})")
    if not math.isfinite(value) or not low <= value <= high:
        raise UserError(f"{label} is {value}: give a number from {low:g} to {high:g} {unit}")
    return float(value)


def _check_symmetry(query: Query) -> None:
    """Refuses cells that are too large, and sites that no group, or what is given, allows."""
    number, units = query.space_group, query.z
    if query.sites is not None and number is None:
        check_positions(query.sites)
    if query.sites is not None and number is not None:
        units = check_sites(query.sites, number, query.formula)
        if query.z not in (None, units):
            raise UserError(f"the sites hold {units} formula units per cell, but z is {query.z}")
    if units is not None and not _agrees(query.formula.units, units, number):
        raise UserError(
            f"the formula counts {query.formula.units} formula units per cell, but z is {units}: "
            "write the reduced formula or leave z out"
        )
    if units is not None:
        centering = wyckoff_summary(number).centering if number else 4
        if units * query.formula.num_atoms > MAX_GIVEN_ATOMS * centering:
            raise UserError(
                f"z = {units} makes {units * query.formula.num_atoms} atoms in the conventional "
                f"cell: at most {MAX_GIVEN_ATOMS} in the primitive cell are supported"
            )


def _agrees(formula_units: int, z: int, number: int | None) -> bool:
    """Whether a formula's real count can be of a primitive or conventional cell with this z."""
    centerings = (wyckoff_summary(number).centering,) if number else (1, 2, 3, 4)
    return formula_units == 1 or any(z in (formula_units, formula_units * c) for c in centerings)


def find_checkpoint(properties: Sequence[str], path: Path | None = None) -> Path:
    """The checkpoint for a property: the given one, or the smallest shipped one that knows it.

    Without a property the band gap's is taken, and samples with the null property.

    Raises:
        UserError: if there is none, or the given one does not know the property.
    """
    wanted = next(iter(properties), None)
    if path is not None:
        known = _known_properties(path)
        if wanted and wanted not in known:
            others = [name for name, one in shipped().items() if wanted in _known_properties(one)]
            raise UserError(
                f"checkpoint {path} was trained with {', '.join(known) or 'no property'}, "
                f"not with {wanted}; give another --checkpoint"
                + (f": {' or '.join(others)}" if others else "")
            )
        return path
    for folder in sorted(shipped().values(), key=_size):
        if (wanted or "band_gap") in _known_properties(folder):
            return folder
    raise UserError(f"no checkpoint for {wanted or 'band_gap'} is installed; give --checkpoint")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _known_properties(folder: Path) -> tuple[str, ...]:
    """Properties that a checkpoint was trained with."""
    model = load_checkpoint(folder).config.get("model")
    known = model.get("properties", ()) if isinstance(model, dict) else None
    if not isinstance(known, list | tuple):
        raise UserError(f"checkpoint {folder}: config.yaml describes no network of this program")
    return tuple(map(str, known))


@dataclass(frozen=True)
class Engine:
    """A loaded network and what ranks symmetries, with what identifies them.

    Attributes:
        generator: the network.
        ranker: what ranks symmetries.
        checkpoint: name and hash of the network's weights.
        backend: the framework of both, which is not ``auto``.
    """

    generator: Generator
    ranker: Ranker
    checkpoint: dict[str, str]
    backend: str

    @property
    def prior(self) -> "TemplatePrior":
        """The training structures."""
        return self.ranker.prior


def load_engine(
    properties: Sequence[str],
    backend: str = "auto",
    checkpoint: str | Path | None = None,
    prior: "TemplatePrior | str | Path | None" = None,
    symmetry_model: str | Path | None = None,
) -> Engine:
    """Loads what is needed to answer queries with a property (or none); see ``generate``.

    Raises:
        UserError: if a file is missing or damaged, or the backend is not there.
    """
    backend = backend_name(backend)
    folder = find_checkpoint(
        properties, None if checkpoint is None else checkpoint_folder(checkpoint)
    )
    loaded = load_checkpoint(folder)
    identity = {
        "name": folder.name,
        "hash": loaded.hash,
        "training_fingerprint": loaded.fingerprint,
    }
    if symmetry_model is not None:
        model_folder(next(iter(properties), None), symmetry_model)  # says what names there are
    # First, for it chooses the device where a process has only one.
    generator = load_generator(folder, backend)
    ranker = load_ranker(properties, symmetry_model, prior, backend)
    return Engine(generator, ranker, identity, backend)


def generate(
    formula: str,
    band_gap: float | None = None,
    formation_energy: float | None = None,
    *,
    space_group: int | str | None = None,
    sites: str | None = None,
    z: int | None = None,
    top: int = 5,
    num_samples: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    backend: str = "auto",
    checkpoint: str | Path | None = None,
    prior: "TemplatePrior | str | Path | None" = None,
    symmetry_model: str | Path | None = None,
    progress: Progress | None = None,
) -> list[GeneratedCrystal]:
    """Crystals of a formula with a wanted property, the most probable symmetry first.

    Args:
        formula: ``SrTiO3``, or with the cell's real count ``Sr2Ti2O6``.
        band_gap: eV.
        formation_energy: eV/atom; at most one property.
        space_group: number 1-230, or a symbol: ``Fm-3m``. One of another setting (``Pbnm``) names
            the group in its standard setting, with a warning.
        sites: ``Sr:1a Ti:1b O:3c``.
        z: formula units in the conventional cell.
        top: symmetries.
        num_samples: crystals sampled per symmetry; see ``common.selection`` for the choice.
        seed: same seed, same crystals.
        steps: network calls per crystal; the checkpoint's own number without it.
        backend: ``auto``, ``torch`` or ``mindspore``.
        checkpoint: folder, or a shipped one's name; the smallest for the property without it.
        prior: symmetry prior; the shipped one without it.
        symmetry_model: what ranks symmetries: ``glm4`` (as without it), the shipped language model
            with the prior; ``prior`` alone (as without it beside a prior of one's own); or the
            folder of a language model. If packages that it needs are missing the prior ranks
            alone, with a warning.
        progress: told what is done.

    Raises:
        UserError: if anything asked for is not possible.
    """
    from common.prior import load_prior

    settings = Settings(top, DEFAULT_SAMPLES if num_samples is None else num_samples, seed, steps)
    query = make_query(
        formula, band_gap, formation_energy, space_group=space_group, sites=sites, z=z
    )
    if query.note:
        warnings.warn(query.note, stacklevel=2)
    if isinstance(prior, str | Path):
        prior = load_prior(Path(prior))
    # What cannot be is said before anything else is loaded.
    rank_symmetries(query, Ranker(load_prior() if prior is None else prior), 1)
    engine = load_engine(tuple(query.properties), backend, checkpoint, prior, symmetry_model)
    if engine.ranker.note:
        warnings.warn(engine.ranker.note, stacklevel=2)
    candidates = rank_symmetries(query, engine.ranker, settings.top)
    return answer(query, candidates, engine, settings, progress)


def answer(
    query: Query,
    candidates: Sequence["SymmetryCandidate"],
    engine: Engine,
    settings: Settings,
    progress: Progress | None = None,
) -> list[GeneratedCrystal]:
    """Samples the symmetries of a query and describes the chosen crystals."""
    (samples,) = sample_symmetries([(query, candidates)], engine, settings, progress)
    sampled = Sampled(query, candidates, samples, settings, engine.checkpoint)
    return describe(sampled, engine.prior, progress)


def sample_symmetries(
    ranked: Sequence[tuple[Query, Sequence["SymmetryCandidate"]]],
    engine: Engine,
    settings: Settings,
    progress: Progress | None = None,
) -> list[list[list[Crystal]]]:
    """Samples several queries in one batch: the crystals of every symmetry of every query."""
    report = progress or (lambda *_: None)
    requests = [
        SampleRequest(c.space_group, c.sites, query.properties, _noise_key(query, c), sample)
        for query, candidates in ranked
        for c in candidates
        for sample in range(settings.num_samples)
    ]
    done = 0

    def advance(number: int) -> None:
        nonlocal done
        done += number
        report("Sampling", done, len(requests))

    report("Sampling", 0, len(requests))
    crystals = iter(
        engine.generator.sample(requests, settings.seed, steps=settings.steps, progress=advance)
    )
    return [
        [list(islice(crystals, settings.num_samples)) for _ in candidates]
        for _, candidates in ranked
    ]


@dataclass(frozen=True)
class Sampled:
    """A query whose symmetries are sampled.

    Attributes:
        query: what was asked.
        candidates: its symmetries, the most probable first.
        samples: the crystals of each.
        settings: how it is answered.
        checkpoint: name and hash of the network's weights.
    """

    query: Query
    candidates: Sequence["SymmetryCandidate"]
    samples: Sequence[Sequence[Crystal]]
    settings: Settings
    checkpoint: dict[str, str]


def describe(
    sampled: Sampled, prior: "TemplatePrior", progress: Progress | None = None
) -> list[GeneratedCrystal]:
    """The chosen crystal of every symmetry of a query, with what is to be said of it.

    Args:
        sampled: the query with its crystals.
        prior: the training structures.
        progress: told what is done.
    """
    report = progress or (lambda *_: None)
    total = len(sampled.candidates)
    crystals = []
    with one_thread():
        for rank in range(1, total + 1):
            report("Comparing", rank - 1, total)
            crystals.append(_describe(rank, sampled, prior))
    report("Comparing", total, total)
    return crystals


def _noise_key(query: Query, candidate: "SymmetryCandidate") -> str:
    """Names a symmetry of a formula, so that its noise depends on nothing else."""
    sites = " ".join(f"{z}:{letter}" for z, letter in candidate.sites)
    return f"{query.formula.text} {candidate.space_group} {sites}"


def _describe(rank: int, sampled: Sampled, prior: "TemplatePrior") -> GeneratedCrystal:
    from common.evaluate.symmetry import composition_is_exact, found_space_groups
    from common.evaluate.validity import closest_pair, min_distance

    query, candidate = sampled.query, sampled.candidates[rank - 1]
    samples = sampled.samples[rank - 1]
    choice = choose_sample(samples)
    crystal = samples[choice.sample]
    structure = crystal.to_structure()
    nearest = prior.nearest(crystal)
    counts = {z: n * candidate.z for z, n in query.formula.reduced}
    found = found_space_groups(structure)
    return GeneratedCrystal(
        rank=rank,
        structure=structure,
        crystal=crystal,
        symmetry=candidate,
        query=query,
        settings=sampled.settings,
        choice=choice,
        checkpoint=sampled.checkpoint,
        nearest=nearest,
        found_groups=found,
        composition_exact=composition_is_exact(structure, counts),
        min_distance=min_distance(structure),
        density=float(structure.density),
        warnings=_warnings(query, candidate, found, closest_pair(structure), nearest, prior),
    )


def _warnings(
    query: Query,
    candidate: "SymmetryCandidate",
    found: dict[str, int],
    closest: "ClosePair",
    nearest: "Nearest | None",
    prior: "TemplatePrior",
) -> tuple[str, ...]:
    from common.reference import volume_text

    notes = []
    for name, value in query.properties.items():
        known = prior.property_range(name)
        if known is not None and not known[0] <= value <= known[1]:
            low, high = (float(f"{limit:.3g}") for limit in known)
            notes.append(
                f"{name.replace('_', ' ')} {value:g} {TARGETS[name][0]} is beyond the known "
                f"crystals' ({low:g} to {high:g}): the cell may be anything"
            )
    if nearest is not None and abs(nearest.volume_change or 0) > OTHER_VOLUME:
        differs = volume_text(nearest.to_dict())
        notes.append(f"the volume per atom is {differs} off that of {nearest.material_id}")
    if closest.share < CLOSE:
        notes.append(f"{' and '.join(closest.symbols)} are only {closest.distance:.2f} A apart")
    if set(found.values()) != {candidate.space_group}:
        named = ", ".join(f"{program} {number}" for program, number in found.items())
        notes.append(f"space group found: {named}")
    strangers = sorted(set(query.formula.counts) - prior.known_elements)
    if strangers:
        symbols = ", ".join(Element.from_Z(z).symbol for z in strangers)
        notes.append(f"not in the training set: {symbols}")
    return tuple(notes)
