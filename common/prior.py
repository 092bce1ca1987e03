"""The template prior: which symmetries a composition may have, learned from the training set.

Training structures of the same anonymous formula vote for their template, each in proportion to how
alike its elements are to the query's in the same roles (and its property to the wanted one). What
has no precedent shares a remainder, the novelty, which is spread over an exact enumeration of legal
sites. Every candidate has exactly the composition asked for. The control for learned symmetry
models.
"""

import hashlib
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from common.crystal.structure import Crystal
from common.crystal.wyckoff import Sites, SymmetryKey, symmetry_key, wyckoff_summary
from common.data.batch import PROPERTY_NAMES
from common.data.store import reduced_formula
from common.elements import PAIR_FEATURES, element_table, pair_differences
from common.errors import UserError
from common.evaluate.match import cell_problem
from common.files import atomic_path
from common.legal_sites import SiteStatistics, enumerate_sites, legal_units, size_class
from common.reference import (
    MAX_COMPARED,
    MAX_COMPARED_ATOMS,
    REFERENCE_SCHEMA,
    Nearest,
    ReferenceIndex,
    reference_columns,
)
from common.templates import (
    RoleLetters,
    Stoichiometry,
    Template,
    assign,
    ordered_sites,
    reduce_counts,
    role_order,
    role_permutations,
    template_sites,
)

if TYPE_CHECKING:
    from common.prior_fit import Comparison

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
_COMPARISONS_PER_CLASS = 120_000
_QUERIES_PER_CLASS = 150


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
class _Entry:
    """A template as the prior stores it: with the letters that training crystals mostly have."""

    template: Template
    letters: RoleLetters
    automorphisms: tuple[tuple[int, ...], ...]

    def to_list(self) -> list[Any]:
        t = self.template
        same = [list(p) for p in self.automorphisms[1:]]
        return [t.stoichiometry, t.space_group, t.units, t.letters, self.letters, same]

    @classmethod
    def from_list(cls, row: Sequence[Any]) -> "_Entry":
        template = Template(tuple(row[0]), row[1], row[2], tuple(row[3]))
        identity = tuple(range(len(template.stoichiometry)))
        return cls(template, tuple(row[4]), (identity, *(tuple(p) for p in row[5])))


@dataclass(frozen=True)
class _Class:
    """Training structures of one anonymous formula.

    Attributes:
        entries: their templates.
        template: [N], index into entries.
        roles: [N,R], atomic number in each role of the template.
        properties: [N,2], band gap (eV) and formation energy (eV/atom), NaN where unknown.
    """

    entries: tuple[_Entry, ...]
    template: NDArray[np.int64]
    roles: NDArray[np.int64]
    properties: Array

    @cached_property
    def orbits(self) -> NDArray[np.int64]:
        """[E,P]: the first of the role permutations that give an entry the same symmetry."""
        permutations = role_permutations(self.entries[0].template.stoichiometry)
        place = {permutation: index for index, permutation in enumerate(permutations)}
        return np.array(
            [
                [min(place[tuple(p[i] for i in a)] for a in e.automorphisms) for p in permutations]
                for e in self.entries
            ]
        )

    def summed(self, mass: Array) -> Array:
        """[E,P]: mass [P,N] by entry and distinct way to give it the elements, else zero."""
        sums = np.zeros(self.orbits.shape)
        for way, row in enumerate(mass):
            by_entry = np.bincount(self.template, row, len(self.entries))
            np.add.at(sums, (np.arange(len(sums)), self.orbits[:, way]), by_entry)
        return sums


@dataclass(frozen=True)
class _Weights:
    """Fitted numbers: of the features, and ln of background and novelty."""

    features: Array
    log_background: float
    log_novelty: float


class TemplatePrior:
    """See the module. Made by ``fit`` or ``load``."""

    def __init__(self, table: pa.Table, metadata: dict[str, Any]) -> None:
        self.metadata = metadata
        self._table = table
        self._elements = np.array(metadata["elements"])
        self._pairs = pair_differences(self._elements)
        self._statistics = SiteStatistics.from_dict(metadata["statistics"])
        entries = [_Entry.from_list(row) for row in metadata["templates"]]
        self._classes = _classes(table, entries)
        self._template_index = {entry.template: i for i, entry in enumerate(entries)}
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
        text = json.dumps(learned, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def known_elements(self) -> frozenset[int]:
        """Atomic numbers that occur in the training set."""
        values = self._table["roles"].combine_chunks().values.to_numpy()
        return frozenset(np.unique(values).tolist())

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

    @classmethod
    def fit(
        cls, records: Iterable[Any], source: Mapping[str, Any] | None = None
    ) -> "TemplatePrior":
        """Learns from training records (``common.data.store.Record``); the same rows, same prior.

        Args:
            records: of the training split only.
            source: JSON-able, says where they came from (name, fingerprint).

        Raises:
            UserError: if there is no record.
        """
        rows = sorted(records, key=lambda record: record.material_id)
        if not rows:
            raise UserError("the template prior needs at least one training structure")
        assignments = [assign(record.crystal) for record in rows]
        entries, index = _entries(assignments)
        columns = reference_columns(rows)
        columns["template"] = [index[a.template] for a in assignments]
        columns["roles"] = [list(a.roles) for a in assignments]
        metadata: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "attribution": ATTRIBUTION,
            "rows": len(rows),
            "source": dict(source or {}),
            "elements": np.round(element_table(), 4).tolist(),
            "templates": [entry.to_list() for entry in entries],
            "statistics": _statistics(rows).to_dict(),
            "weights": {},
        }
        table = pa.Table.from_pydict(columns, schema=_SCHEMA)
        prior = cls(table, metadata)
        metadata["weights"] = prior._fit_all()
        return cls(table, metadata)

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
            if nothing legal fits what was fixed. Probabilities are of all candidates, so those
            returned may sum to less than one. Where `top` is above 20 the first 20 may be others
            than without: more symmetries without precedent share the novelty, and they are looked
            for where templates alone would have filled the 20.
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
        weights = self._parameters({})
        mass = self._kernel(structures, elements, {}) + math.exp(weights.log_background)
        mass[:, (structures.roles == elements[:, None]).all(axis=2).any(axis=0)] = 0.0
        total = mass.sum() + math.exp(weights.log_novelty)
        sums = structures.summed(mass)
        listed = np.argsort(-sums, axis=None, kind="stable")[:top]
        found = []
        for number, way in zip(*np.unravel_index(listed, sums.shape), strict=True):
            if not sums[number, way]:
                break
            t = structures.entries[number].template
            sites = template_sites(
                elements[way].tolist(), structures.entries[number].letters, t.space_group
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
        rows = self.reference.rows_of_formula(crystal.formula_counts)[:MAX_COMPARED]
        same = [{z: z for z in crystal.formula_counts} for _ in rows]
        found = self.reference.closest(structure, rows, same)
        kind = "same composition"
        if found is None:
            rows, replacements = self._same_template(crystal)
            found = self.reference.closest(structure, rows, replacements)
            kind = "same prototype"
        if found is None:
            return None
        row, distance = found
        other = self.reference.crystal(row)
        return Nearest(
            self.reference.material_id(row),
            reduced_formula(other.formula_counts),
            other.space_group,
            distance,
            kind,
        )

    def _same_template(self, crystal: Crystal) -> tuple[list[int], list[dict[int, int]]]:
        """Rows with the crystal's template, the most alike first, and what replaces what."""
        assignment = assign(crystal)
        if assignment.template not in self._template_index:
            return [], []
        pairs = self._pairs @ self._weights["none"].features[: len(PAIR_FEATURES)]
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
        choices = [z] if z else [units] if units else None
        known = {symmetry_key(n, s) for n, s in seen}
        legal = [
            x
            for x in enumerate_sites(
                formula, self._statistics, space_group=space_group, units=choices, top=2 * top
            )
            if _fits(x.space_group, x.units, space_group, z, units)
            and symmetry_key(x.space_group, x.sites) not in known
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
        weights = self._parameters(properties)
        mass = self._kernel(structures, elements, properties) + math.exp(weights.log_background)
        found = []
        sums = structures.summed(mass)
        for entry, row, orbits in zip(structures.entries, sums, structures.orbits, strict=True):
            t = entry.template
            for index in np.unique(orbits).tolist():
                sites = template_sites(elements[index].tolist(), entry.letters, t.space_group)
                found.append((t.space_group, sites, t.units, float(row[index])))
        return found

    def _kernel(
        self, structures: _Class, elements: NDArray[np.int64], properties: Mapping[str, float]
    ) -> Array:
        """How alike a query in each permutation [P,R] and each training structure are: [P,N]."""
        weights = self._parameters(properties).features
        width = len(PAIR_FEATURES)
        distance = np.zeros((len(elements), len(structures.template)))
        tables = self._pairs @ weights[:width], self._pairs @ weights[width : 2 * width]
        anion = self._anion(elements)
        for role in range(elements.shape[1]):
            wanted, present = elements[:, role], structures.roles[:, role]
            plain, anionic = (table[wanted][:, present] for table in tables)
            distance += np.where(anion[:, role, None], anionic, plain)
        if properties:
            distance += self._property_differences(structures, properties) @ weights[2 * width :]
        kernel: Array = np.exp(-distance)
        return kernel

    def _anion(self, elements: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which role of each row holds the most electronegative element: [P,R]."""
        negativity = self._elements[elements, 3]
        most: NDArray[np.bool_] = negativity == negativity.max(axis=1, keepdims=True)
        return most

    @staticmethod
    def _property_differences(structures: _Class, properties: Mapping[str, float]) -> Array:
        """[N,2]: saturating distance of the property, and metal against non-metal for gaps."""
        ((name, value),) = properties.items()
        known = structures.properties[:, PROPERTY_NAMES.index(name)]
        distance = np.abs(known - value)
        scale = 1.0 if name == "band_gap" else 0.3
        other_kind = (known > 0.05) != (value > 0.05) if name == "band_gap" else distance > 1.0
        features = np.stack([distance / (scale + distance), other_kind.astype(float)], axis=1)
        return np.where(np.isnan(known)[:, None], 0.5, features)

    def _fit_all(self) -> dict[str, Any]:
        """Weights without a property and with either; a property that no structure has weighs none.

        With too few structures to compare the others stay where they start, and no likelihood is
        known.
        """
        from common.prior_fit import fit_weights

        fitted = {}
        start = unfitted = np.concatenate([np.full(2 * len(PAIR_FEATURES), 0.5), [-6.0, 0.0]])
        for name in ("none", *PROPERTY_NAMES):
            comparisons = self._comparisons(None if name == "none" else name)
            parameters, likelihood = unfitted, None
            if comparisons:
                parameters, reached = fit_weights(comparisons, start)
                likelihood = round(reached, 4)
            features = parameters[:-2]
            fitted[name] = {
                "features": features.tolist(),
                "log_background": float(parameters[-2]),
                "log_novelty": float(parameters[-1]),
                "mean_log_likelihood": likelihood,
            }
            if name == "none":
                start, unfitted = (
                    np.concatenate([features, [weight, weight], parameters[-2:]])
                    for weight in (0.5, 0.0)
                )
        return fitted

    def _comparisons(self, name: str | None) -> list["Comparison"]:
        comparisons = []
        for stoichiometry in sorted(self._classes):
            comparison = self._compare(stoichiometry, self._classes[stoichiometry], name)
            if comparison is not None:
                comparisons.append(comparison)
        return comparisons

    def _compare(
        self, stoichiometry: Stoichiometry, structures: _Class, name: str | None
    ) -> "Comparison | None":
        """Evenly chosen structures of a class, which have the property, against all of it."""
        from common.prior_fit import Comparison

        size = len(structures.template)
        permutations = np.array(role_permutations(stoichiometry))
        limit = max(4, _COMPARISONS_PER_CLASS // (size * len(permutations)))
        asked = np.arange(size)
        if name is not None:
            asked = np.flatnonzero(~np.isnan(structures.properties[:, PROPERTY_NAMES.index(name)]))
        if size < 2 or len(permutations) > 24 or not len(asked):
            return None
        count = min(len(asked), limit, _QUERIES_PER_CLASS)
        chosen = asked[np.unique(np.linspace(0, len(asked) - 1, count).astype(int))]
        parts = [self._compare_one(structures, i, permutations, name) for i in chosen]
        differences, allowed, correct = (np.stack(x) for x in zip(*parts, strict=True))
        return Comparison(differences, allowed, correct, len(asked) / len(chosen))

    def _compare_one(
        self, structures: _Class, index: int, permutations: NDArray[np.int64], name: str | None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
        """One structure as the query: see ``Comparison``."""
        own = structures.roles[index]
        elements = own[permutations]
        pairs = self._pairs[elements[:, None, :], structures.roles[None]]
        anion = self._anion(elements)[:, None, :, None]
        parts = [(pairs * ~anion).sum(axis=2), (pairs * anion).sum(axis=2)]
        if name is not None:
            value = float(structures.properties[index, PROPERTY_NAMES.index(name)])
            by_structure = self._property_differences(structures, {name: value})
            parts.append(np.broadcast_to(by_structure, (len(elements), *by_structure.shape)))
        differences = np.concatenate(parts, axis=-1)
        allowed = (np.sort(structures.roles, axis=1) != np.sort(own)).any(axis=1)
        entry = structures.entries[structures.template[index]]
        right_roles = [
            permutation in entry.automorphisms for permutation in map(tuple, permutations.tolist())
        ]
        correct = np.array(right_roles)[:, None] & (
            structures.template == structures.template[index]
        )
        allowed = np.broadcast_to(allowed, correct.shape)
        flat = differences.reshape(-1, differences.shape[-1]).astype(np.float32)
        return flat, allowed.ravel(), correct.ravel()


def load_prior(path: Path = SHIPPED) -> TemplatePrior:
    """The prior of a path, read once for all who ask for it, until the file is another one."""
    return _read_prior(path, path.stat().st_mtime_ns if path.is_file() else 0)


@lru_cache(maxsize=2)
def _read_prior(path: Path, changed: int) -> TemplatePrior:
    return TemplatePrior.load(path)


_SCHEMA = pa.schema(
    [
        *REFERENCE_SCHEMA,
        pa.field("template", pa.int32(), nullable=False),
        pa.field("roles", pa.list_(pa.uint8()), nullable=False),
    ]
)


def _entries(assignments: Sequence[Any]) -> tuple[list[_Entry], dict[Template, int]]:
    """All templates with the labelling that most of their crystals have."""
    labellings: dict[Template, Counter[RoleLetters]] = defaultdict(Counter)
    for assignment in assignments:
        labellings[assignment.template][assignment.as_labelled] += 1
    ordered = sorted(labellings, key=lambda t: (t.stoichiometry, t.space_group, t.units, t.letters))
    entries = [
        _Entry(
            template,
            min(labellings[template].items(), key=lambda item: (-item[1], item[0]))[0],
            template.automorphisms,
        )
        for template in ordered
    ]
    return entries, {template: index for index, template in enumerate(ordered)}


def _statistics(records: Sequence[Any]) -> SiteStatistics:
    groups: dict[int, Counter[int]] = defaultdict(Counter)
    letters: dict[int, Counter[str]] = defaultdict(Counter)
    atoms: Counter[int] = Counter()
    for record in records:
        number = record.crystal.space_group
        letters[number].update(site.letter for site in record.crystal.sites)
        formula, _ = reduce_counts(record.crystal.formula_counts)
        groups[size_class(sum(formula.values()))][number] += 1
        atoms[record.crystal.num_primitive_atoms] += 1
    return SiteStatistics(groups, atoms, letters)


def _classes(table: pa.Table, entries: Sequence[_Entry]) -> dict[Stoichiometry, _Class]:
    template = table["template"].to_numpy()
    gaps = [table[name].to_numpy(zero_copy_only=False) for name in PROPERTY_NAMES]
    properties = np.stack(gaps, axis=1).astype(float)
    roles = table["roles"].combine_chunks()
    values, offsets = roles.values.to_numpy(), roles.offsets.to_numpy()
    members: dict[Stoichiometry, list[int]] = defaultdict(list)
    for row, number in enumerate(template.tolist()):
        members[entries[number].template.stoichiometry].append(row)
    classes = {}
    for stoichiometry, rows in members.items():
        used, local = np.unique(template[rows], return_inverse=True)
        columns = offsets[np.array(rows)][:, None] + np.arange(len(stoichiometry))
        classes[stoichiometry] = _Class(
            tuple(entries[number] for number in used),
            local,
            values[columns].astype(np.int64),
            properties[rows],
        )
    return classes


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
