"""The template prior: which symmetries a composition may have, learned from the training set.

Training structures of the same anonymous formula vote for their template, each in proportion to how
alike its elements are to the query's in the same roles (and its property to the wanted one). What
has no precedent shares a remainder, the novelty, which is spread over the likeliest legal sites
that a search gives. Every candidate has exactly the composition asked for. The control for learned
symmetry models.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from common.crystal.structure import Crystal
from common.crystal.wyckoff import Sites, SymmetryKey, symmetry_key, wyckoff_summary
from common.elements import PAIR_FEATURES, formula_text
from common.errors import UserError
from common.evaluate.validity import cell_problem
from common.files import atomic_path
from common.legal_sites import SiteStatistics, enumerate_sites, legal_units
from common.prior_classes import Likeness, StoredTemplate, StructureClass, structure_classes
from common.reference import (
    MAX_COMPARED,
    MAX_COMPARED_ATOMS,
    MAX_POLYMORPHS,
    Nearest,
    ReferenceIndex,
)
from common.templates import (
    Template,
    assign,
    ordered_sites,
    reduce_counts,
    role_order,
    role_permutations,
    template_sites,
)

Array = NDArray[np.float64]

SCHEMA_VERSION = 1
SHIPPED = Path(__file__).resolve().parent / "assets" / "template_prior.parquet"
ATTRIBUTION = (
    "Derived from Materials Project data (CC BY 4.0; Jain et al., APL Materials 1, 011002 (2013)), "
    "training split of MP-20 (Xie et al., ICLR 2022)."
)

_METADATA_KEY = b"uni_mdm_prior"
#: So many are always ranked, lest order and probabilities depend on how many are shown.
_FEWEST = 20


@dataclass(frozen=True)
class SymmetryCandidate:
    """A symmetry that a composition may have.

    Attributes:
        space_group: number 1-230.
        sites: atomic number and letter of every orbit.
        z: formula units in the conventional cell.
        probability: of this symmetry among all, given what was fixed.
        source: ``template`` (seen in training), ``enumeration`` (legal, not seen), ``given`` or
            ``language model``.
    """

    space_group: int
    sites: Sites
    z: int
    probability: float
    source: str

    @property
    def key(self) -> SymmetryKey:
        """Group and sites, the same for all descriptions of them."""
        return symmetry_key(self.space_group, self.sites)


@dataclass(frozen=True)
class Vote:
    """A symmetry that training structures of other compositions have, elements replaced.

    Attributes:
        space_group, sites: as in ``SymmetryCandidate``.
        elements: of the most alike of these structures, where the query has the elements that its
            counts name one after the other.
        share: of all votes and the novelty.
    """

    space_group: int
    sites: Sites
    elements: tuple[int, ...]
    share: float


@dataclass(frozen=True)
class _Weights:
    """Fitted numbers: of the features, and ln of background and novelty."""

    features: Array
    log_background: float
    log_novelty: float


class TemplatePrior:
    """See the module. Made by ``common.prior_fit.fit_prior`` or ``load``."""

    def __init__(self, table: pa.Table, metadata: dict[str, Any]) -> None:
        self.metadata = metadata
        self._table = table
        self._likeness = Likeness(np.array(metadata["elements"]))
        self._statistics = SiteStatistics.from_dict(metadata["statistics"])
        templates = [StoredTemplate.from_list(row) for row in metadata["templates"]]
        self._classes = structure_classes(table, templates)
        self._template_index = {stored.template: i for i, stored in enumerate(templates)}
        self._weights = {
            name: _Weights(np.array(w["features"]), w["log_background"], w["log_novelty"])
            for name, w in metadata["weights"].items()
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process, which makes its own of what is kept here."""
        return TemplatePrior, (self._table, self.metadata)

    @cached_property
    def hash(self) -> str:
        """Names the prior: 12 hex digits of the SHA-256 of what was learned, not of the source."""
        learned = {key: value for key, value in self.metadata.items() if key != "source"}
        digest = hashlib.sha256(json.dumps(learned, sort_keys=True).encode())
        for name in sorted(self._table.column_names):
            digest.update(_content(self._table[name]))
        return digest.hexdigest()[:12]

    @cached_property
    def known_elements(self) -> frozenset[int]:
        """Atomic numbers that occur in the training set."""
        values = self._table["roles"].combine_chunks().values.to_numpy()
        return frozenset(np.unique(values).tolist())

    def property_range(self, name: str) -> tuple[float, float] | None:
        """Smallest and largest value in the training set; None if no structure has one."""
        limits = pc.min_max(self._table[name]).as_py()
        return None if limits["min"] is None else (limits["min"], limits["max"])

    @cached_property
    def reference(self) -> ReferenceIndex:
        """The training structures, to find the nearest of them."""
        return ReferenceIndex(self._table)

    @cached_property
    def rows_of_template(self) -> dict[Template, list[int]]:
        """Rows of the reference with each template."""
        numbers = self._table["template"].to_numpy()
        order = np.argsort(numbers, kind="stable")
        starts = np.searchsorted(numbers[order], np.arange(len(self._template_index) + 1))
        return {
            template: order[starts[i] : starts[i + 1]].tolist()
            for template, i in self._template_index.items()
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the prior as one Parquet file; the same prior gives the same bytes.

        Raises:
            UserError: if the path is not writable.
        """
        text = json.dumps(self.metadata, sort_keys=True, separators=(",", ":"), allow_nan=False)
        table = self._table.replace_schema_metadata({_METADATA_KEY: text.encode()})
        with atomic_path(path) as temporary:
            pq.write_table(
                table,
                temporary,
                compression="zstd",
                compression_level=19,
                write_page_checksum=True,
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str] = SHIPPED) -> "TemplatePrior":
        """Reads a prior; without a path the shipped one.

        Raises:
            UserError: if the file is missing, damaged or something else.
        """
        if not Path(path).is_file():
            raise UserError(f"no template prior at {path}; give the path of one, or reinstall")
        try:
            table = pq.read_table(path, page_checksum_verification=True, use_threads=False)
            metadata = json.loads(table.schema.metadata[_METADATA_KEY])
            if metadata["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema version {metadata['schema_version']}")
            return cls(table, metadata)
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"cannot read the template prior {path}: damaged ({reason})") from error

    def rank(
        self,
        counts: Mapping[int, int],
        properties: Mapping[str, float] | None = None,
        *,
        space_group: int | None = None,
        z: int | None = None,
        units: int | None = None,
        sites: Sites | None = None,
        top: int = 20,
    ) -> list[SymmetryCandidate]:
        """The likeliest symmetries of a composition.

        Args:
            counts: atoms of each atomic number; only their ratio matters.
            properties: ``band_gap`` (eV) or ``formation_energy`` (eV/atom), at most one.
            space_group: only this one.
            z: only this number of formula units in the conventional cell.
            units: only this number of formula units in the primitive or the conventional cell.
            sites: only these, in any group where they are legal.
            top: how many.

        Returns:
            at most `top` candidates, the likeliest first, each with exactly this composition; empty
            if nothing legal fits what was fixed. There are more than those returned, so that their
            probabilities may sum to less than one; the novelty is shared by those without precedent
            that are found, so that the probability of one of these is an upper bound. Where `top`
            is above 20 the first 20 may be others than without: more symmetries without precedent
            share the novelty, and they are looked for where templates alone would have filled the
            20.
        """
        most = max(top, _FEWEST)
        formula, _ = reduce_counts(counts)
        kept = {
            (n, s if sites is None else ordered_sites(sites, n)): (u, mass)
            for n, s, u, mass in self._templates(formula, properties or {})
            if _fits(n, u, space_group, z, units) and (sites is None or _same(n, s, sites))
        }
        total = sum(mass for _, mass in kept.values())
        novelty = math.exp(self._parameters(properties or {}).log_novelty)
        if space_group:
            novelty *= math.exp(self._statistics.log_group(space_group, sum(formula.values())))
        ranked = sorted(kept.items(), key=lambda item: (-item[1][1], item[0]))
        candidates = [
            SymmetryCandidate(n, s, u, mass / (total + novelty), "template")
            for (n, s), (u, mass) in ranked[:most]
        ]
        if len(candidates) < most or total < novelty:
            share = novelty / (total + novelty)
            candidates += self._unseen(
                formula, share, set(kept), space_group, z, units, sites, most
            )
        candidates.sort(key=lambda c: (-c.probability, c.space_group, c.sites))
        return candidates[:top]

    def rank_new(
        self,
        counts: Mapping[int, int],
        properties: Mapping[str, float] | None = None,
        *,
        top: int = 20,
    ) -> list[SymmetryCandidate]:
        """``rank`` with what training has of the same composition moved to its end.

        A crystal that training has not seen is another polymorph where training has its
        composition, and ``rank`` then answers with the known one. Known symmetries get no
        probability; theirs is divided among the others.
        """
        known = self.known_symmetries(counts)
        ranked = self.rank(counts, properties, top=max(top, _FEWEST) + len(known))
        last = [c for c in ranked if c.key in known]
        left = 1 - sum(c.probability for c in last)
        new = [replace(c, probability=c.probability / left) for c in ranked if c.key not in known]
        return [*new, *(replace(c, probability=0.0) for c in last)][:top]

    def known_symmetries(self, counts: Mapping[int, int]) -> frozenset[SymmetryKey]:
        """Those that crystals of a composition have in training.

        Args:
            counts: atoms of each atomic number; only their ratio matters.
        """
        rows = self.reference.rows_of_formula(counts)
        return frozenset(self.reference.crystal(row).symmetry_key for row in rows)

    def votes(self, counts: Mapping[int, int], top: int) -> list[Vote]:
        """How training structures of other compositions vote, the most votes first.

        Args:
            counts: atoms of each atomic number; only their ratio matters.
            top: symmetries, at most.
        """
        formula, _ = reduce_counts(counts)
        order = role_order(formula)
        stoichiometry = tuple(formula[z] for z in order)
        structures = self._classes.get(stoichiometry)
        if structures is None:
            return []
        elements = np.array(order)[np.array(role_permutations(stoichiometry))]
        mass = self._mass(structures, elements, {})
        mass[:, (structures.roles == elements[:, None]).all(axis=2).any(axis=0)] = 0.0
        total = mass.sum() + math.exp(self._parameters({}).log_novelty)
        sums = structures.summed(mass)
        listed = np.argsort(-sums, axis=None, kind="stable")[:top]
        found = []
        for number, way in zip(*np.unravel_index(listed, sums.shape), strict=True):
            if not sums[number, way]:
                break
            t = structures.templates[number].template
            sites = template_sites(
                elements[way].tolist(), structures.templates[number].letters, t.space_group
            )
            votes = mass * (structures.template == number)
            votes[structures.orbits[number] != way] = 0.0
            other, row = np.unravel_index(votes.argmax(), votes.shape)
            present = dict(
                zip(elements[other].tolist(), structures.roles[row].tolist(), strict=True)
            )
            alike = tuple(present[z] for z in formula)
            found.append(Vote(t.space_group, sites, alike, float(sums[number, way] / total)))
        return found

    def labelled(
        self, counts: Mapping[int, int], candidates: Iterable[SymmetryCandidate]
    ) -> list[SymmetryCandidate]:
        """Candidates with the letters that ``rank`` gives them, where their template is known.

        Args:
            counts: atoms of each atomic number; only their ratio matters.
            candidates: of this composition, in any description.
        """
        formula, _ = reduce_counts(counts)
        known = {symmetry_key(n, s): s for n, s, _, _ in self._templates(formula, {})}
        return [replace(c, sites=known.get(c.key, c.sites)) for c in candidates]

    def nearest(self, crystal: Crystal) -> Nearest | None:
        """The training structure nearest to a crystal: of its composition, else of its template.

        Returns:
            None if none matches within StructureMatcher's tolerances, or the cell is broken.
        """
        structure = crystal.to_structure(primitive=True)
        if len(structure) > MAX_COMPARED_ATOMS or cell_problem(structure):
            return None
        rows = self.reference.rows_of_formula(crystal.formula_counts)[:MAX_POLYMORPHS]
        itself = [{z: z for z in crystal.formula_counts} for _ in rows]
        found = self.reference.closest(structure, rows, itself)
        kind = "same composition"
        if found is None:
            rows, replacements = self._same_template(crystal)
            found = self.reference.closest(structure, rows, replacements)
            kind = "same prototype"
        if found is None:
            return None
        row, distance = found
        other = self.reference.crystal(row)
        same = kind == "same composition"
        return Nearest(
            self.reference.material_id(row),
            formula_text(other.formula_counts),
            other.space_group,
            distance,
            kind,
            crystal.volume_per_atom / other.volume_per_atom - 1 if same else None,
        )

    def _same_template(self, crystal: Crystal) -> tuple[list[int], list[dict[int, int]]]:
        """Rows with the crystal's template, the most alike first, and what replaces what."""
        assignment = assign(crystal)
        if assignment.template not in self._template_index:
            return [], []
        pairs = self._likeness.pairs @ self._weights["none"].features[: len(PAIR_FEATURES)]
        ranked = []
        for row in self.rows_of_template[assignment.template]:
            roles = self.reference.roles(row)
            for automorphism in assignment.template.automorphisms:
                wanted = [assignment.roles[i] for i in automorphism]
                ranked.append((float(pairs[wanted, roles].sum()), row, wanted))
        ranked.sort()
        chosen = ranked[:MAX_COMPARED]
        rows = [row for _, row, _ in chosen]
        replacements = [
            dict(zip(self.reference.roles(row), wanted, strict=True)) for _, row, wanted in chosen
        ]
        return rows, replacements

    def _unseen(
        self,
        formula: Mapping[int, int],
        share: float,
        seen: set[tuple[int, Sites]],
        space_group: int | None,
        z: int | None,
        units: int | None,
        sites: Sites | None,
        top: int,
    ) -> list[SymmetryCandidate]:
        """Legal symmetries without precedent, which share a probability."""
        if sites is not None:
            return self._given_sites(formula, share, seen, sites, space_group, z, units)
        known = {symmetry_key(n, s) for n, s in seen}
        legal = [
            x
            for x in enumerate_sites(
                formula, self._statistics, space_group=space_group, units=units, z=z, top=2 * top
            )
            if symmetry_key(x.space_group, x.sites) not in known
        ]
        if not legal:
            return []
        weights = np.exp([x.log_weight - legal[0].log_weight for x in legal])
        weights *= share / weights.sum()
        return [
            SymmetryCandidate(
                x.space_group,
                ordered_sites(x.sites, x.space_group),
                x.units,
                float(weight),
                "enumeration",
            )
            for x, weight in zip(legal, weights, strict=True)
        ]

    def _given_sites(
        self,
        formula: Mapping[int, int],
        share: float,
        seen: set[tuple[int, Sites]],
        sites: Sites,
        space_group: int | None,
        z: int | None,
        units: int | None,
    ) -> list[SymmetryCandidate]:
        """A user's sites in every group where they are legal, by how common the group is."""
        found = []
        for number in [space_group] if space_group else range(1, 231):
            formula_units = legal_units(number, sites, formula)
            if formula_units is None or not _fits(number, formula_units, space_group, z, units):
                continue
            if not any(n == number for n, _ in seen):
                log_group = self._statistics.log_group(number, sum(formula.values()))
                found.append((number, formula_units, math.exp(log_group)))
        total = sum(weight for _, _, weight in found)
        return [
            SymmetryCandidate(n, ordered_sites(sites, n), u, share * weight / total, "enumeration")
            for n, u, weight in found
        ]

    def _parameters(self, properties: Mapping[str, float]) -> _Weights:
        return self._weights[next(iter(properties), "none")]

    def _mass(
        self,
        structures: StructureClass,
        elements: NDArray[np.int64],
        properties: Mapping[str, float],
    ) -> Array:
        """Votes of structures for a query in each permutation [P,R]: [P,N]."""
        weights = self._parameters(properties)
        kernel = self._likeness.kernel(structures, elements, properties, weights.features)
        return kernel + math.exp(weights.log_background)

    def _templates(
        self, formula: Mapping[int, int], properties: Mapping[str, float]
    ) -> list[tuple[int, Sites, int, float]]:
        """Space group, sites, formula units and mass of every template with these elements."""
        order = role_order(formula)
        stoichiometry = tuple(formula[z] for z in order)
        structures = self._classes.get(stoichiometry)
        if structures is None:
            return []
        permutations = role_permutations(stoichiometry)
        elements = np.array(order)[np.array(permutations)]
        mass = self._mass(structures, elements, properties)
        found = []
        sums = structures.summed(mass)
        for stored, row, orbits in zip(structures.templates, sums, structures.orbits, strict=True):
            t = stored.template
            for index in np.unique(orbits).tolist():
                sites = template_sites(elements[index].tolist(), stored.letters, t.space_group)
                found.append((t.space_group, sites, t.units, float(row[index])))
        return found


def load_prior(path: Path = SHIPPED) -> TemplatePrior:
    """The prior of a path, read once for all who ask for it, until the file is another one."""
    return _read_prior(path, path.stat().st_mtime_ns if path.is_file() else 0)


@lru_cache(maxsize=2)
def _read_prior(path: Path, changed: int) -> TemplatePrior:
    return TemplatePrior.load(path)


def _content(column: pa.ChunkedArray) -> bytes:
    """The values of a column, the same for all ways to keep them in memory."""
    if pa.types.is_list(column.type):
        lengths, values = pc.list_value_length(column), pc.list_flatten(column)
        return _content(lengths) + _content(values)
    if pa.types.is_string(column.type):
        return json.dumps(column.to_pylist()).encode()
    return column.to_numpy().tobytes()  # NaN where a property is not known


def _fits(
    number: int, formula_units: int, space_group: int | None, z: int | None, units: int | None
) -> bool:
    """Whether a symmetry agrees with what the user fixed."""
    primitive = formula_units / wyckoff_summary(number).centering
    return (
        space_group in (None, number)
        and z in (None, formula_units)
        and (units is None or units in (formula_units, primitive))
    )


def _same(number: int, sites: Sites, wanted: Sites) -> bool:
    """Whether two lists of sites are the same up to the group's normaliser."""
    summary = wyckoff_summary(number)
    if any(letter not in summary.letters for _, letter in wanted):
        return False
    return summary.canonical(sites) == summary.canonical(wanted)
