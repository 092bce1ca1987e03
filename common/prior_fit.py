"""Makes the template prior; its few weights are fitted leaving out one set of elements at a time.

Maximised is the likelihood of every training structure's symmetry given the structures of its
anonymous formula that have other elements. With k_i = exp(-w . D_i) the kernel between the query
and training structure i, whose elements are matched one to one, e the background and c the novelty,
a symmetry that the structures I realise has

    P = sum_{i in I} (k_i + e) / (c + sum_i (k_i + e))

and one that none of them realises has c / (c + sum_i (k_i + e)).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.optimize import minimize

from common.data.batch import PROPERTY_NAMES
from common.data.store import Record
from common.elements import PAIR_FEATURES, element_table
from common.errors import UserError
from common.legal_sites import SiteStatistics, size_class
from common.prior import ATTRIBUTION, SCHEMA_VERSION, TemplatePrior
from common.prior_classes import (
    SCHEMA,
    Likeness,
    StoredTemplate,
    StructureClass,
    property_differences,
    structure_classes,
)
from common.reference import reference_columns
from common.templates import (
    Assignment,
    RoleLetters,
    Stoichiometry,
    Template,
    assign,
    reduce_counts,
    role_permutations,
)

Array = NDArray[np.float64]

#: Largest weight of a feature, and what the sum of their squares is multiplied by in the loss.
_MAX_WEIGHT = 12.0
_PENALTY = 1e-3
_COMPARISONS_PER_CLASS = 120_000
_QUERIES_PER_CLASS = 150


def fit_prior(records: Iterable[Record], source: Mapping[str, Any] | None = None) -> TemplatePrior:
    """Learns from training records; the same rows, same prior.

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
    templates, index = _stored_templates(assignments)
    columns = reference_columns(rows)
    columns["template"] = [index[a.template] for a in assignments]
    columns["roles"] = [list(a.roles) for a in assignments]
    table = pa.Table.from_pydict(columns, schema=SCHEMA)
    elements = np.round(element_table(), 4)
    metadata: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "attribution": ATTRIBUTION,
        "rows": len(rows),
        "source": dict(source or {}),
        "elements": elements.tolist(),
        "templates": [stored.to_list() for stored in templates],
        "statistics": _statistics(rows).to_dict(),
        "weights": _fit_all(structure_classes(table, templates), Likeness(elements)),
    }
    return TemplatePrior(table, metadata)


def _stored_templates(
    assignments: Sequence[Assignment],
) -> tuple[list[StoredTemplate], dict[Template, int]]:
    """All templates with the labelling that most of their crystals have."""
    labellings: dict[Template, Counter[RoleLetters]] = defaultdict(Counter)
    for assignment in assignments:
        labellings[assignment.template][assignment.as_labelled] += 1
    ordered = sorted(labellings, key=lambda t: (t.stoichiometry, t.space_group, t.units, t.letters))
    templates = [
        StoredTemplate(
            template,
            min(labellings[template].items(), key=lambda item: (-item[1], item[0]))[0],
            template.automorphisms,
        )
        for template in ordered
    ]
    return templates, {template: index for index, template in enumerate(ordered)}


def _statistics(records: Sequence[Record]) -> SiteStatistics:
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


@dataclass(frozen=True)
class Comparison:
    """Some queries against the training structures of their stoichiometry.

    Attributes:
        differences: [Q,M,F], M runs over matchings (training structure and role permutation).
        allowed: [Q,M], false for structures of the query's own elements, in whichever roles.
        correct: [Q,M], the matching gives the query's own symmetry.
        weight: how many structures each query stands for.
    """

    differences: NDArray[np.float32]
    allowed: NDArray[np.bool_]
    correct: NDArray[np.bool_]
    weight: float


def _fit_all(classes: Mapping[Stoichiometry, StructureClass], likeness: Likeness) -> dict[str, Any]:
    """Weights without a property and with either; a property that no structure has weighs none.

    With too few structures to compare the others stay where they start, and no likelihood is
    known.
    """
    fitted = {}
    start = unfitted = np.concatenate([np.full(2 * len(PAIR_FEATURES), 0.5), [-6.0, 0.0]])
    for name in ("none", *PROPERTY_NAMES):
        comparisons = _comparisons(classes, likeness, None if name == "none" else name)
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


def _comparisons(
    classes: Mapping[Stoichiometry, StructureClass], likeness: Likeness, name: str | None
) -> list[Comparison]:
    found = (_compare(key, classes[key], likeness, name) for key in sorted(classes))
    return [comparison for comparison in found if comparison is not None]


def _compare(
    stoichiometry: Stoichiometry, structures: StructureClass, likeness: Likeness, name: str | None
) -> Comparison | None:
    """Evenly chosen structures of a class, which have the property, against all of it."""
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
    parts = [_compare_one(structures, likeness, i, permutations, name) for i in chosen]
    differences, allowed, correct = (np.stack(x) for x in zip(*parts, strict=True))
    return Comparison(differences, allowed, correct, len(asked) / len(chosen))


def _compare_one(
    structures: StructureClass,
    likeness: Likeness,
    index: int,
    permutations: NDArray[np.int64],
    name: str | None,
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
    """One structure as the query: see ``Comparison``."""
    own = structures.roles[index]
    elements = own[permutations]
    pairs = likeness.pairs[elements[:, None, :], structures.roles[None]]
    anion = likeness.anion(elements)[:, None, :, None]
    parts = [(pairs * ~anion).sum(axis=2), (pairs * anion).sum(axis=2)]
    if name is not None:
        value = float(structures.properties[index, PROPERTY_NAMES.index(name)])
        by_structure = property_differences(structures, {name: value})
        parts.append(np.broadcast_to(by_structure, (len(elements), *by_structure.shape)))
    differences = np.concatenate(parts, axis=-1)
    allowed = (np.sort(structures.roles, axis=1) != np.sort(own)).any(axis=1)
    stored = structures.templates[structures.template[index]]
    right_roles = [
        permutation in stored.automorphisms for permutation in map(tuple, permutations.tolist())
    ]
    correct = np.array(right_roles)[:, None] & (structures.template == structures.template[index])
    allowed = np.broadcast_to(allowed, correct.shape)
    flat = differences.reshape(-1, differences.shape[-1]).astype(np.float32)
    return flat, allowed.ravel(), correct.ravel()


def fit_weights(comparisons: Sequence[Comparison], start: Array) -> tuple[Array, float]:
    """Weights [F] and then ln e and ln c, fitted from a start, and what is reached.

    That is the mean log-likelihood less the penalty of large weights.
    """
    features = comparisons[0].differences.shape[-1]
    total = sum(len(c.differences) * c.weight for c in comparisons)

    def loss(parameters: Array) -> tuple[float, Array]:
        value, gradient = 0.0, np.zeros_like(parameters)
        for comparison in comparisons:
            part, slope = _log_likelihood(parameters, comparison)
            value += comparison.weight * part
            gradient += comparison.weight * slope
        weights = parameters[:features]
        gradient = -gradient / total
        gradient[:features] += 2 * _PENALTY * weights
        return -value / total + _PENALTY * float(weights @ weights), gradient

    bounds = [(0.0, _MAX_WEIGHT)] * features + [(-16.0, 0.0), (-12.0, 6.0)]
    result = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 60}
    )
    # A few digits only: the last ones depend on the machine's linear algebra.
    return np.round(result.x, 4), -float(result.fun)


def _log_likelihood(parameters: Array, comparison: Comparison) -> tuple[float, Array]:
    """Summed over a comparison's queries, with its gradient."""
    weights, background, novelty = parameters[:-2], np.exp(parameters[-2]), np.exp(parameters[-1])
    differences = comparison.differences
    kernel = np.exp(-(differences @ weights.astype(np.float32))) * comparison.allowed
    correct = comparison.correct & comparison.allowed
    known = correct.any(axis=1)
    floor = background * comparison.allowed.sum(axis=1)
    everything = kernel.sum(axis=1) + floor + novelty
    right = np.where(
        known, (kernel * correct).sum(axis=1) + background * correct.sum(axis=1), novelty
    )
    # d ln(right) - d ln(everything), as one coefficient per matching.
    coefficient = kernel / everything[:, None]
    coefficient -= np.where(known[:, None], kernel * correct / right[:, None], 0.0)
    slope_weights = np.einsum("qm,qmf->f", coefficient, differences)
    slope_floor = np.where(known, background * correct.sum(axis=1) / right, 0) - floor / everything
    slope_novelty = np.where(known, 0.0, 1.0) - novelty / everything
    slope = np.concatenate([slope_weights, [slope_floor.sum()], [slope_novelty.sum()]])
    return float(np.log(right / everything).sum()), slope
