"""Whether a predicted crystal is the reference crystal, and how far its atoms are from it.

The definition is pymatgen's ``StructureMatcher(ltol, stol, angle_tol).get_rms_dist(predicted,
reference)[0]``: both crystals reduced to primitive Niggli cells of one volume, every mapping of one
lattice onto the other within tolerance, every shift of the rarest element, the best assignment of
atoms; the root mean square displacement in units of (V/N)^(1/3). The search here gives the same
number, several times faster: lattice mappings are handled as arrays, and the standard and the
tight tolerance share one search.
"""

import signal
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Element, Lattice, Structure
from pymatgen.util.coord_cython import (  # type: ignore[import-not-found]  # compiled
    is_coord_subset_pbc,
    pbc_shortest_vectors,
)
from rich.progress import track
from scipy.optimize import linear_sum_assignment

from common.evaluate.validity import (
    cell_is_sound,
    cell_problem,
    inverse_lengths,
    is_valid,
    min_distance,
)
from common.machine import cpu_count, one_thread, worker_pool

Array = NDArray[np.float64]

OVERLAP = 0.1
"""Atoms closer than this (A) lie on top of each other: no crystal, hence no match."""
CPU_SECONDS = 60.0
"""Processor time after which one pair counts as not matched (typical: 0.02 s)."""
PERFECT = 1e-5
"""An rms below this cannot be told from zero: the search stops."""
_AGAIN_AFTER = 1.0  # s of processor time until a timeout that was lost is raised again
_PAIRS_PER_WORKER = 100  # fewer are not worth starting a process for


@dataclass(frozen=True)
class Thresholds:
    """Tolerances of a match.

    Attributes:
        stol: atom displacement, in units of (V/N)^(1/3).
        angle_tol: difference of lattice angles, degrees.
        ltol: relative difference of lattice lengths.
    """

    stol: float
    angle_tol: float
    ltol: float


STANDARD = Thresholds(stol=0.5, angle_tol=10.0, ltol=0.3)
TIGHT = Thresholds(stol=0.3, angle_tol=5.0, ltol=0.2)


@dataclass(frozen=True)
class MatchItem:
    """One reference and what was predicted for it, best rank first (None: nothing came out)."""

    candidates: tuple[Structure | None, ...]
    reference: Structure


@dataclass(frozen=True)
class CandidateMatch:
    """How one candidate compares with its reference.

    Attributes:
        rms: normalised rms distance at the standard tolerance; None without a match.
        tight_rms: the same at the tight tolerance.
        valid: candidate and reference both pass the validity filter.
        failure: why the comparison could not be made, such as ``timeout``; None if it was made.
        volume_ratio: of the volumes per atom, candidate to reference, which ``rms`` does not count;
            None without a match.
    """

    rms: float | None
    tight_rms: float | None
    valid: bool
    failure: str | None = None
    volume_ratio: float | None = None


class CpuTimeout(Exception):
    """The processor-time limit of a pair was reached."""


def match_many(
    items: Sequence[MatchItem],
    workers: int | None = None,
    *,
    progress: bool = True,
    cpu_seconds: float = CPU_SECONDS,
) -> list[tuple[CandidateMatch, ...]]:
    """Compare every candidate with its reference, in the order given.

    Structures that are broken (not finite, flat, atoms on top of each other, disordered) or that
    exceed `cpu_seconds` do not match; no exception is raised for them.

    Args:
        items: references with their candidates.
        workers: processes; by default one per processor, fewer when there is little to do. They
            are spawned: a script that asks for several needs an ``if __name__ == "__main__"``.
        progress: show a progress bar.
        cpu_seconds: processor time allowed per pair.

    Returns:
        Per item one result per candidate. The same for any number of workers.
    """
    work = partial(_match_item, cpu_seconds=cpu_seconds)
    if workers is None:
        pairs = sum(len(item.candidates) for item in items)
        workers = min(cpu_count(), 1 + pairs // _PAIRS_PER_WORKER)
    show = partial(track, description="Matching", total=len(items), disable=not progress)
    workers = min(workers, len(items))
    if workers <= 1:
        with one_thread():
            return list(show(map(work, items)))
    chunk = max(1, min(16, len(items) // (4 * workers)))
    with worker_pool(workers) as pool:
        return list(show(pool.map(work, items, chunksize=chunk)))


def pool_by_composition(items: Sequence[MatchItem]) -> list[MatchItem]:
    """Give each item the candidates of every other item of its composition too, own ones first.

    METRe and cRMSE ask whether a reference was found by any candidate of its composition.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        groups[item.reference.composition.reduced_formula].append(index)
    pooled = list(items)
    for members in groups.values():
        for index in members:
            others = (items[other].candidates for other in members if other != index)
            candidates = sum(others, start=items[index].candidates)
            pooled[index] = replace(items[index], candidates=candidates)
    return pooled


def _match_item(item: MatchItem, cpu_seconds: float) -> tuple[CandidateMatch, ...]:
    reference = _Reference(item.reference)
    return tuple(_match_candidate(one, reference, cpu_seconds) for one in item.candidates)


def _match_candidate(
    candidate: Structure | None, reference: "_Reference", cpu_seconds: float
) -> CandidateMatch:
    if candidate is None:
        return CandidateMatch(None, None, valid=False, failure="nothing predicted")
    found, failure = _compare(candidate, reference, (STANDARD, TIGHT), cpu_seconds)
    valid = reference.valid and failure is None and is_valid(candidate)
    ratio = None
    if found[0] is not None:
        ratio = _volume_per_atom(candidate) / _volume_per_atom(reference.structure)
    return CandidateMatch(found[0], found[1], valid, failure, ratio)


def _volume_per_atom(structure: Structure) -> float:
    return float(structure.volume) / len(structure)


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Raise CpuTimeout after that much processor time; no limit outside the main thread.

    Processor time, so that a busy machine gives the same results as an idle one. An exception that
    a signal raises within a destructor or a callback of the garbage collector is lost: it is raised
    again later, at the latest when the work is done.
    """
    if not hasattr(signal, "setitimer") or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    expired = False

    def expire(_signal: int, _frame: FrameType | None) -> None:
        nonlocal expired
        expired = True
        raise CpuTimeout

    previous = signal.signal(signal.SIGVTALRM, expire)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _AGAIN_AFTER)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:  # even if the limit was reached while the timer was being stopped
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
    if expired:
        raise CpuTimeout


@dataclass(frozen=True)
class Cell:
    """A crystal reduced to a Niggli cell: lattice rows (A), [N,3], [N]."""

    lattice: Array
    frac_coords: Array
    numbers: NDArray[np.int64]


class _Reference:
    """A reference whose reduction and validity are shared by its candidates."""

    def __init__(self, structure: Structure) -> None:
        self.sound = cell_is_sound(structure)
        self.valid = self.sound and is_valid(structure)
        self.formula = structure.composition.element_composition.reduced_formula
        self.structure = structure
        self._cell: Cell | None = None

    def cell(self) -> Cell:
        if self._cell is None:
            self._cell = reduced_cell(self.structure)
        return self._cell


def _compare(
    predicted: Structure,
    reference: _Reference,
    thresholds: Sequence[Thresholds],
    cpu_seconds: float,
) -> tuple[list[float | None], str | None]:
    """Rms distance for each tolerance (loosest first), and why there is none if it broke off."""
    unmatched: list[float | None] = [None] * len(thresholds)
    try:
        with _cpu_limit(cpu_seconds), warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            if reason := _broken(predicted):
                return unmatched, reason
            if not reference.sound:
                return unmatched, "broken reference"
            if predicted.composition.element_composition.reduced_formula != reference.formula:
                return unmatched, None
            if len(predicted) % len(reference.cell().numbers):
                return unmatched, None  # no smaller cell of it has the reference's atoms
            return _search(reduced_cell(predicted), reference.cell(), thresholds), None
    except CpuTimeout:
        return unmatched, "timeout"
    except Exception as error:  # a structure can break cell reduction in many ways: no match
        return unmatched, f"{type(error).__name__}: {error}"


def _broken(structure: Structure) -> str | None:
    if reason := cell_problem(structure):
        return reason
    return "overlapping atoms" if min_distance(structure) < OVERLAP else None


def reduced_cell(structure: Structure, primitive: bool = True) -> Cell:
    """The Niggli cell, oxidation states dropped.

    Args:
        structure: a cell without ``cell_problem``.
        primitive: whether to look for a smaller cell, which averages distortions of up to 0.25 A.
    """
    numbers = [site.specie.Z for site in structure]
    plain = Structure(
        structure.lattice, [Element.from_Z(z) for z in numbers], structure.frac_coords
    )
    reduced = plain.get_reduced_structure(reduction_algo="niggli")
    if primitive:
        reduced = reduced.get_primitive_structure()
    return Cell(
        np.array(reduced.lattice.matrix, dtype=float),
        np.array(reduced.frac_coords, dtype=float),
        np.array(reduced.atomic_numbers, dtype=np.int64),
    )


def cell_distance(predicted: Cell, reference: Cell, thresholds: Thresholds) -> float | None:
    """Normalised rms distance of two cells with the same number of atoms, None if too far apart."""
    return _search(predicted, reference, (thresholds,))[0]


def _search(
    predicted: Cell, reference: Cell, thresholds: Sequence[Thresholds]
) -> list[float | None]:
    """The smallest rms distance at each tolerance, the first of which contains the others."""
    best = np.full(len(thresholds), np.inf)
    if not np.array_equal(np.sort(predicted.numbers), np.sort(reference.numbers)):
        return [None] * len(thresholds)
    ratio = abs(np.linalg.det(reference.lattice) / np.linalg.det(predicted.lattice)) ** (1 / 6)
    source = predicted.lattice * ratio
    target = reference.lattice / ratio
    mappings = _Mappings(source, target, predicted.frac_coords @ source, thresholds)
    mask = (reference.numbers[:, None] != predicted.numbers).astype(np.int64)
    # All atoms of the rarest element are tried as the partner of one reference atom.
    anchor = int(np.argmax(mask.sum(axis=1)))
    partners = np.flatnonzero(mask[anchor] == 0)
    for index in range(len(mappings)):
        allowed = mappings.allowed[:, index] & (best >= PERFECT)
        if not allowed.any():
            if (best < PERFECT).all():
                break
            continue
        atoms = mappings.frac_coords[index]
        for partner in partners:
            moved = reference.frac_coords + (atoms[partner] - reference.frac_coords[anchor])
            for level in np.flatnonzero(allowed):
                # A stricter tolerance cannot give less than the first one gave here.
                value = mappings.rms(index, moved, mask, thresholds[level].stol)
                best[level] = min(best[level], value)
                if not value < best[level + 1 :].max(initial=0):
                    break
    return [
        float(value) if value < limit.stol else None
        for value, limit in zip(best, thresholds, strict=True)
    ]


class _Mappings:
    """Every choice of lattice vectors of `source` that looks like `target`, K of them.

    Attributes:
        allowed: [T,K], which of them each of T tolerances accepts.
        frac_coords: [K,N,3], the atoms of the source in each choice, in [0,1).
    """

    def __init__(
        self, source: Array, target: Array, cart_coords: Array, thresholds: Sequence[Thresholds]
    ) -> None:
        vectors = _similar_bases(source, target, thresholds[0])
        parameters, aim = _parameters(vectors), _parameters(target)
        self.allowed = np.array([_within(parameters, aim, one) for one in thresholds])
        frac_coords = cart_coords @ np.linalg.inv(vectors)
        self.frac_coords = frac_coords - np.floor(frac_coords)
        averages = (parameters + aim) / 2
        self._averages = _from_parameters(averages)
        volumes = np.abs(np.linalg.det(self._averages))
        self._scale = (len(cart_coords) / volumes) ** (1 / 3)
        self._inverse_lengths = inverse_lengths(self._averages)
        # Symmetric cells give the same average lattice many times.
        self._keys = [row.tobytes() for row in np.round(averages, 8)]
        self._lattices: dict[bytes, tuple[Lattice, Array]] = {}

    def __len__(self) -> int:
        return len(self._averages)

    def rms(self, index: int, moved: Array, mask: NDArray[np.int64], stol: float) -> float:
        """Rms distance of the source's atoms and those `moved`, infinite where too far apart."""
        atoms, scale = self.frac_coords[index], self._scale[index]
        # Twice stol: the common shift is only settled below.
        reach = 2 * stol / scale
        if not is_coord_subset_pbc(moved, atoms, self._inverse_lengths[index] * reach, mask):
            return np.inf
        lattice, reduced_lengths = self._lattice(index)
        vectors, squares = pbc_shortest_vectors(
            lattice, moved, atoms, mask, return_d2=True, lll_frac_tol=reduced_lengths * reach
        )
        rows, columns = linear_sum_assignment(squares)
        steps = vectors[rows, columns]
        steps = steps - steps.mean(axis=0)
        return float(np.linalg.norm(steps) * scale / np.sqrt(len(steps)))

    def _lattice(self, index: int) -> tuple[Lattice, Array]:
        key = self._keys[index]
        if key not in self._lattices:
            lattice = Lattice(self._averages[index])
            self._lattices[key] = lattice, inverse_lengths(lattice.lll_matrix)
        return self._lattices[key]


def _similar_bases(source: Array, target: Array, limit: Thresholds) -> Array:
    """Bases of the lattice `source` whose lengths and angles are those of `target`: [K,3,3]."""
    lengths = np.linalg.norm(target, axis=1)
    points: Any = Lattice(source).get_points_in_sphere(
        [[0, 0, 0]], [0, 0, 0], lengths.max() * (1 + limit.ltol), zip_results=False
    )
    steps, distances = np.asarray(points[0], dtype=float), np.asarray(points[1], dtype=float)
    ratios = distances[:, None] / lengths
    fits = (ratios < 1 + limit.ltol) & (ratios > 1 / (1 + limit.ltol))
    a, b, c = (steps[column] for column in fits.T)
    alpha, beta, gamma = _parameters(target)[3:]
    gamma_fits = _angle_fits(a @ source, b @ source, gamma, limit)
    beta_fits = _angle_fits(a @ source, c @ source, beta, limit)
    alpha_fits = _angle_fits(b @ source, c @ source, alpha, limit)
    first, second = np.nonzero(gamma_fits)
    pair, third = np.nonzero(beta_fits[first] & alpha_fits[second])
    bases = np.stack([a[first[pair]], b[second[pair]], c[third]], axis=1).reshape(-1, 3, 3)
    bases = bases[np.abs(np.abs(np.linalg.det(bases)) - 1) < 0.5]
    found: Array = bases @ source
    return found


def _angle_fits(first: Array, second: Array, angle: float, limit: Thresholds) -> NDArray[np.bool_]:
    """Which pairs [n,m] of vectors make that angle (degrees)."""
    norms = np.linalg.norm(first, axis=1)[:, None] * np.linalg.norm(second, axis=1)
    angles = np.rad2deg(np.arccos(np.clip(first @ second.T / norms, -1, 1)))
    fits: NDArray[np.bool_] = np.abs(angles - angle) <= limit.angle_tol
    return fits


def _within(parameters: Array, aim: Array, limit: Thresholds) -> NDArray[np.bool_]:
    """Which cells [K,6] have the lengths and angles [6] aimed at."""
    ratios = parameters[:, :3] / aim[:3]
    lengths_fit = ((ratios < 1 + limit.ltol) & (ratios > 1 / (1 + limit.ltol))).all(axis=1)
    angles_fit = (np.abs(parameters[:, 3:] - aim[3:]) <= limit.angle_tol).all(axis=1)
    fits: NDArray[np.bool_] = lengths_fit & angles_fit
    return fits


def _parameters(lattice: Array) -> Array:
    """a, b, c (A), alpha, beta, gamma (degrees) of lattices [...,3,3] (rows): [...,6]."""
    lengths = np.linalg.norm(lattice, axis=-1)
    unit = lattice / lengths[..., None]
    cosines = np.stack(
        [(unit[..., i, :] * unit[..., j, :]).sum(axis=-1) for i, j in ((1, 2), (0, 2), (0, 1))],
        axis=-1,
    )
    return np.concatenate([lengths, np.rad2deg(np.arccos(np.clip(cosines, -1, 1)))], axis=-1)


def _from_parameters(parameters: Array) -> Array:
    """Lattices [K,3,3] (rows) of parameters [K,6], c along z."""
    a, b, c = parameters[:, :3].T
    (alpha, beta, gamma) = np.deg2rad(parameters[:, 3:]).T
    cosine = (np.cos(alpha) * np.cos(beta) - np.cos(gamma)) / (np.sin(alpha) * np.sin(beta))
    turn = np.arccos(np.clip(cosine, -1, 1))
    zero = np.zeros_like(a)
    rows = [
        [a * np.sin(beta), zero, a * np.cos(beta)],
        [-b * np.sin(alpha) * np.cos(turn), b * np.sin(alpha) * np.sin(turn), b * np.cos(alpha)],
        [zero, zero, c],
    ]
    return np.array(rows).transpose(2, 0, 1)
