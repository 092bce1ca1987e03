"""Training structures as the template prior keeps them, and how alike they are to a query."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from common.data.batch import PROPERTY_NAMES
from common.elements import PAIR_FEATURES, pair_differences
from common.reference import REFERENCE_SCHEMA
from common.templates import RoleLetters, Stoichiometry, Template, role_permutations

Array = NDArray[np.float64]

#: Of a table of training structures.
SCHEMA = pa.schema(
    [
        *REFERENCE_SCHEMA,
        pa.field("template", pa.int32(), nullable=False),
        pa.field("roles", pa.list_(pa.uint8()), nullable=False),
    ]
)


@dataclass(frozen=True)
class StoredTemplate:
    """A template as the prior stores it: with the letters that training crystals mostly have."""

    template: Template
    letters: RoleLetters
    automorphisms: tuple[tuple[int, ...], ...]

    def to_list(self) -> list[Any]:
        """As JSON types."""
        t = self.template
        same = [list(p) for p in self.automorphisms[1:]]
        return [t.stoichiometry, t.space_group, t.units, t.letters, self.letters, same]

    @classmethod
    def from_list(cls, row: Sequence[Any]) -> "StoredTemplate":
        """From what ``to_list`` gave."""
        template = Template(tuple(row[0]), row[1], row[2], tuple(row[3]))
        identity = tuple(range(len(template.stoichiometry)))
        return cls(template, tuple(row[4]), (identity, *(tuple(p) for p in row[5])))


@dataclass(frozen=True)
class StructureClass:
    """Training structures of one anonymous formula.

    Attributes:
        templates: theirs.
        template: [N], index into these.
        roles: [N,R], atomic number in each role of the template.
        properties: [N,2], band gap (eV) and formation energy (eV/atom), NaN where unknown.
    """

    templates: tuple[StoredTemplate, ...]
    template: NDArray[np.int64]
    roles: NDArray[np.int64]
    properties: Array

    @cached_property
    def orbits(self) -> NDArray[np.int64]:
        """[T,P]: the first of the role permutations that give a template the same symmetry."""
        permutations = role_permutations(self.templates[0].template.stoichiometry)
        place = {permutation: index for index, permutation in enumerate(permutations)}
        return np.array(
            [
                [min(place[tuple(p[i] for i in a)] for a in e.automorphisms) for p in permutations]
                for e in self.templates
            ]
        )

    def summed(self, mass: Array) -> Array:
        """[T,P]: mass [P,N] by template and distinct way to give it the elements, else zero."""
        sums = np.zeros(self.orbits.shape)
        for way, row in enumerate(mass):
            by_template = np.bincount(self.template, row, len(self.templates))
            np.add.at(sums, (np.arange(len(sums)), self.orbits[:, way]), by_template)
        return sums


class Likeness:
    """Features of how alike a composition and training structures are, by elements in their roles.

    Args:
        elements: as ``common.elements.element_table``.
    """

    def __init__(self, elements: Array) -> None:
        self._elements = elements
        self.pairs = pair_differences(elements)

    def kernel(
        self,
        structures: StructureClass,
        elements: NDArray[np.int64],
        properties: Mapping[str, float],
        weights: Array,
    ) -> Array:
        """exp(-weights . features) of a query in each permutation [P,R] and each structure: [P,N].

        Args:
            structures: N of them, of R roles.
            elements: of the query, atomic number in each role.
            properties: at most one that is wanted.
            weights: of the features: those of ``PAIR_FEATURES`` for all roles but the most
                electronegative, the same for that one, and the property's two if there is one.
        """
        width = len(PAIR_FEATURES)
        distance = np.zeros((len(elements), len(structures.template)))
        tables = self.pairs @ weights[:width], self.pairs @ weights[width : 2 * width]
        anion = self.anion(elements)
        for role in range(elements.shape[1]):
            wanted, present = elements[:, role], structures.roles[:, role]
            plain, anionic = (table[wanted][:, present] for table in tables)
            distance += np.where(anion[:, role, None], anionic, plain)
        if properties:
            distance += property_differences(structures, properties) @ weights[2 * width :]
        kernel: Array = np.exp(-distance)
        return kernel

    def anion(self, elements: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which role of each row holds the most electronegative element: [P,R]."""
        negativity = self._elements[elements, 3]
        most: NDArray[np.bool_] = negativity == negativity.max(axis=1, keepdims=True)
        return most


def property_differences(structures: StructureClass, properties: Mapping[str, float]) -> Array:
    """[N,2]: saturating distance of the property, and metal against non-metal for gaps."""
    ((name, value),) = properties.items()
    known = structures.properties[:, PROPERTY_NAMES.index(name)]
    distance = np.abs(known - value)
    scale = 1.0 if name == "band_gap" else 0.3
    other_kind = (known > 0.05) != (value > 0.05) if name == "band_gap" else distance > 1.0
    features = np.stack([distance / (scale + distance), other_kind.astype(float)], axis=1)
    return np.where(np.isnan(known)[:, None], 0.5, features)


def structure_classes(
    table: pa.Table, templates: Sequence[StoredTemplate]
) -> dict[Stoichiometry, StructureClass]:
    """The rows of a table (``SCHEMA``) by stoichiometry."""
    template = table["template"].to_numpy()
    gaps = [table[name].to_numpy(zero_copy_only=False) for name in PROPERTY_NAMES]
    properties = np.stack(gaps, axis=1).astype(float)
    roles = table["roles"].combine_chunks()
    values, offsets = roles.values.to_numpy(), roles.offsets.to_numpy()
    members: dict[Stoichiometry, list[int]] = defaultdict(list)
    for row, number in enumerate(template.tolist()):
        members[templates[number].template.stoichiometry].append(row)
    classes = {}
    for stoichiometry, rows in members.items():
        used, local = np.unique(template[rows], return_inverse=True)
        columns = offsets[np.array(rows)][:, None] + np.arange(len(stoichiometry))
        classes[stoichiometry] = StructureClass(
            tuple(templates[number] for number in used),
            local,
            values[columns].astype(np.int64),
            properties[rows],
        )
    return classes
