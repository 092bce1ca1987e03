"""Known crystals to start from: which one, with which elements, in which description."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from common import checkpoint, precedents
from common.checkpoint import (
    CARD,
    PRECEDENTS,
    load_checkpoint,
    save_step,
    shipped,
    shipped_language,
)
from common.crystal.structure import Crystal, Site
from common.data.store import Cell, Record, fingerprint, is_fingerprint
from common.elements import element_table, pair_differences
from common.errors import UserError
from common.precedents import (
    PrecedentIndex,
    former_rows,
    load_precedents,
    precedents_file,
    training_items,
    unlike,
)
from common.prior import TemplatePrior
from common.sampling import read_checkpoint

VOLUME = np.full(119, 20.0)


def perovskite(a: int, b: int, x: int, edge: float, shifted: bool = False) -> Crystal:
    """Cubic; described from the other metal if shifted."""
    letters = "bac" if not shifted else "abd"
    sites = tuple(Site(z, letter) for z, letter in zip((a, b, x), letters, strict=True))
    return Crystal(221, sites, np.eye(3) * edge)


def rutile(metal: int, anion: int, x: float) -> Crystal:
    return Crystal(136, (Site(metal, "a"), Site(anion, "f", (x, 0.0, 0.0))), np.diag([4.6, 4.6, 3]))


RECORDS = [
    Record("SrTiO3", perovskite(38, 22, 8, 3.9)),
    Record("BaTiO3", perovskite(56, 22, 8, 4.0, shifted=True)),
    Record("KMgF3", perovskite(19, 12, 9, 4.0)),
    Record("TiO2", rutile(22, 8, 0.305)),
    Record("MnF2", rutile(25, 9, 0.31)),
]


@pytest.fixture
def index() -> PrecedentIndex:
    return PrecedentIndex.of_crystals(
        [r.crystal for r in RECORDS], [r.material_id for r in RECORDS], VOLUME
    )


def test_the_most_similar_elements_come_first(index: PrecedentIndex) -> None:
    wanted = perovskite(20, 22, 8, 1.0)  # CaTiO3; the lattice is not looked at
    found = index.find(wanted, 3)
    assert [one.material_id for one in found] == ["SrTiO3", "BaTiO3", "KMgF3"]
    for one in found:
        named = [(site.atomic_number, site.letter) for site in one.crystal.sites]
        assert named == [(20, "b"), (22, "a"), (8, "c")]
    assert found[0].differences[1:] == (0.0, 0.0)
    assert 0 < found[0].differences[0] < found[1].differences[0]
    assert [one.numbers for one in found] == [(38, 22, 8), (56, 22, 8), (19, 12, 9)]
    assert index.find(wanted, exclude="SrTiO3")[0].material_id == "BaTiO3"
    assert index.find(Crystal(225, (Site(11, "a"), Site(17, "b")), np.eye(3))) == []


def test_the_order_of_rows_decides_nothing() -> None:
    """Two equally similar crystals."""
    rows = [("mp-2", perovskite(38, 22, 8, 3.9)), ("mp-1", perovskite(38, 22, 8, 3.8))]
    for known in (rows, rows[::-1]):
        names, crystals = zip(*known, strict=True)
        index = PrecedentIndex.of_crystals(crystals, names, VOLUME)
        found = index.find(perovskite(20, 22, 8, 1.0), 2)
        assert [one.material_id for one in found] == ["mp-1", "mp-2"]
    rows = [("mp-2", wurtzite_order(30, 30, 8)), ("mp-1", wurtzite_order(30, 30, 8, z=0.12))]
    for known in (rows, rows[::-1]):  # isopointal
        names, crystals = zip(*known, strict=True)
        index = PrecedentIndex.of_crystals(crystals, names, VOLUME)
        found = index.find(wurtzite_order(30, 12, 8), 2)
        assert [one.material_id for one in found] == ["mp-1", "mp-2"]


def test_many_equal_roles_get_the_most_similar_elements() -> None:
    """Twelve elements on the same letter, of whose permutations there are 479 million."""
    known, wanted = (
        Crystal(1, tuple(Site(z, "a", (z / 90, 0.1, 0.2)) for z in elements), 8 * np.eye(3))
        for elements in (range(3, 15), range(33, 45))
    )
    (found,) = PrecedentIndex.of_crystals([known], ["known"], VOLUME).find(wanted)
    costs = pair_differences(element_table()).mean(axis=-1)[3:15, 33:45]
    assert sum(found.differences) == pytest.approx(costs[linear_sum_assignment(costs)].sum())
    assert sum(found.differences) < np.trace(costs) - 0.1


def test_the_lattice_takes_the_volume_of_the_new_elements() -> None:
    volume = VOLUME.copy()
    volume[22] = 30.0
    index = PrecedentIndex.of_crystals([rutile(25, 9, 0.31)], ["MnF2"], volume)
    (found,) = index.find(rutile(22, 8, 0.0))
    ratio = np.linalg.det(found.crystal.lattice) / (4.6**2 * 3)
    assert np.isclose(ratio, (2 * 30 + 4 * 20) / (6 * 20))
    assert found.crystal.sites[1].free_params[0] == pytest.approx(0.31)


def wurtzite_order(first: int, second: int, anion: int, z: float = 0.1) -> Crystal:
    """Two metals and two anions on equal positions of P3m1, as in superlattices of wurtzite."""
    sites = ((first, "b", 0.0), (second, "a", 0.5), (anion, "b", 0.37 + z), (anion, "a", 0.87 + z))
    return Crystal(
        156,
        tuple(Site(n, letter, (0.0, 0.0, x)) for n, letter, x in sites),
        lattice_of_hexagon(3.2, 5.2),
    )


def lattice_of_hexagon(a: float, c: float) -> np.ndarray:
    return np.array([[a, 0, 0], [-a / 2, a * np.sqrt(3) / 2, 0], [0, 0, c]])


def test_isopointal_crystals_stand_in_for_a_prototype_that_is_not_known() -> None:
    known = [
        wurtzite_order(30, 30, 8),  # ZnO, which shares its positions out in another way
        wurtzite_order(13, 13, 7, z=0.12),  # AlN
        rutile(22, 8, 0.305),
    ]
    volume = VOLUME.copy()
    volume[12] = 30.0
    index = PrecedentIndex.of_crystals(known, ["ZnO", "AlN", "TiO2"], volume)
    wanted = wurtzite_order(12, 30, 8)  # (Mg,Zn)O
    assert index.find(wanted, isopointal=False) == []
    first, second = index.find(wanted, 4)
    assert [first.material_id, second.material_id] == ["ZnO", "AlN"]
    named = [(site.atomic_number, site.letter) for site in wanted.sites]
    assert [(site.atomic_number, site.letter) for site in first.crystal.sites] == named
    assert first.numbers == (30, 30, 8, 8)
    assert first.differences[1:] == (0.0, 0.0, 0.0)
    assert first.differences[0] > 0
    assert second.numbers == (13, 13, 7, 7)
    ratio = np.linalg.det(first.crystal.lattice) / np.linalg.det(known[0].lattice)
    assert np.isclose(ratio, (30 + 3 * 20) / (4 * 20))
    assert index.find(wanted, exclude="ZnO")[0].material_id == "AlN"
    # A crystal of the prototype goes before them, however unlike its elements are.
    fourth = wurtzite_order(55, 92, 35)
    index = PrecedentIndex.of_crystals([*known, fourth], ["ZnO", "AlN", "TiO2", "own"], volume)
    assert [one.material_id for one in index.find(wanted, 2)] == ["own", "ZnO"]


def test_elements_go_where_they_are_most_like_the_former_ones() -> None:
    """Whichever letters a description has: here the origin is at the other metal."""
    known = Crystal(221, (Site(56, "a"), Site(22, "b"), Site(8, "c")), np.eye(3) * 4.0)
    index = PrecedentIndex.of_crystals([known], ["BaTiO3"], VOLUME)
    # Ba on both metals' places is another template; oxygen's place stays oxygen's.
    wanted = Crystal(221, (Site(56, "a"), Site(56, "b"), Site(8, "d")), np.eye(3))
    (found,) = index.find(wanted)
    assert [site.letter for site in found.crystal.sites] == ["a", "b", "d"]
    assert sorted(found.numbers) == [8, 22, 56]
    assert found.numbers[2] == 8


def test_the_shipped_table_gives_what_its_rows_give() -> None:
    prior = TemplatePrior.load()
    index = PrecedentIndex.of_prior(prior, VOLUME)
    for row in (5, 5000, 20000):
        crystal, name = prior.reference.crystal(row), prior.reference.material_id(row)
        found = index.find(crystal)[0]
        assert sum(found.differences) == 0.0
        others = index.find(crystal, exclude=name)
        assert all(one.material_id != name for one in others)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNI_MDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cached_precedents_are_those_of_the_elements_volumes(
    index: PrecedentIndex, own_cache: Path
) -> None:
    volume = VOLUME.copy()
    volume[12] *= 2  # magnesium, in one of the perovskites
    other = PrecedentIndex.of_crystals(
        [r.crystal for r in RECORDS], [r.material_id for r in RECORDS], volume
    )
    volumes = []
    for one in (index, other, index):
        items = training_items(RECORDS, one, "print", workers=1)
        known = [item.precedent.crystal for item in items if item.precedent]
        volumes.append([abs(np.linalg.det(crystal.lattice)) for crystal in known])
    assert not np.allclose(volumes[0], volumes[1])
    np.testing.assert_array_equal(volumes[0], volumes[2])


def test_training_rows_are_described_near_their_precedents(
    index: PrecedentIndex, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrored = Record("SnO2", rutile(50, 8, 0.695))  # the same atoms as x = 0.305
    rows = [
        *RECORDS,
        mirrored,
        Record("NaCl", Crystal(225, (Site(11, "a"), Site(17, "b")), np.eye(3))),
    ]
    items = training_items(rows, index, "print", workers=1)
    assert items[-1].precedent is None
    assert items[-1].crystal is rows[-1].crystal
    names = [item.precedent.material_id for item in items[:-1] if item.precedent]
    assert names == ["BaTiO3", "SrTiO3", "BaTiO3", "MnF2", "TiO2", "TiO2"]
    assert items[5].crystal.sites[1].free_params[0] == pytest.approx(0.305)
    assert items[0].properties is RECORDS[0].properties

    twice = training_items(rows, index, "print", count=2, workers=1)
    names = [item.precedent.material_id for item in twice if item.precedent]
    assert names[:6] == ["BaTiO3", "KMgF3", "SrTiO3", "KMgF3", "BaTiO3", "SrTiO3"]
    assert [item.properties for item in twice[::2]] == [item.properties for item in items]
    assert [item.precedent for item in twice[-2:]] == [None, None]

    def never(*_: object) -> None:
        raise AssertionError("described anew")

    monkeypatch.setattr(precedents, "_describe", never)
    again = training_items(rows, index, "print", workers=1)
    for one, other in zip(items[:-1], again[:-1], strict=True):
        assert one.crystal.to_dict() == other.crystal.to_dict()
        assert one.precedent is not None
        assert other.precedent is not None
        assert one.precedent.differences == other.precedent.differences
        assert one.precedent.numbers == other.precedent.numbers


def test_rows_in_another_order_are_not_mixed_up(index: PrecedentIndex, own_cache: Path) -> None:
    training_items(RECORDS, index, "print", workers=1)
    for record, item in zip(
        RECORDS[::-1], training_items(RECORDS[::-1], index, "print", workers=1), strict=True
    ):
        assert item.crystal.formula_counts == record.crystal.formula_counts
        assert item.properties is record.properties


def test_another_label_of_a_structure_is_not_taken_from_the_cache(
    index: PrecedentIndex, own_cache: Path
) -> None:
    """As of another version of spglib, while the fingerprint is that of the structure."""
    cell = Cell.from_structure(rutile(22, 8, 0.305).to_structure())
    rows = [Record("TiO2", rutile(22, 8, x), cell) for x in (0.305, 0.3051)]
    assert fingerprint(rows[:1]) == fingerprint(rows[1:])
    for row, x in zip(rows, (0.305, 0.3051), strict=True):
        (item,) = training_items([row], index, "print", workers=1)
        assert item.crystal.sites[1].free_params[0] == pytest.approx(x, abs=1e-9)


def test_a_damaged_cache_is_made_anew(index: PrecedentIndex, own_cache: Path) -> None:
    expected = training_items(RECORDS, index, "print", workers=1)
    (path,) = (own_cache / "precedents").glob("*.json.gz")
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:20], b"", b"no gzip"):
        path.write_bytes(damaged)
        found = training_items(RECORDS, index, "print", workers=1)
        assert [item.precedent.material_id for item in found if item.precedent] == [
            item.precedent.material_id for item in expected if item.precedent
        ]
        assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written(
    index: PrecedentIndex, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_cache.write_text("a file where a folder should be")
    with pytest.raises(UserError, match="set UNI_MDM_CACHE to another folder"):
        training_items(RECORDS, index, "print", workers=1)


def test_a_checkpoint_finds_its_precedents(tmp_path: Path) -> None:
    shipped = TemplatePrior.load().metadata["source"]["fingerprint"]
    assert precedents_file(RECORDS, shipped, shipped) == {}
    for indexed, trained_on in (("others", shipped), (shipped, "others")):
        assert precedents_file(RECORDS, indexed, trained_on)
    assert load_precedents(tmp_path, shipped, VOLUME).find(RECORDS[3].crystal)
    with pytest.raises(UserError, match=r"precedents\.parquet is missing"):
        load_precedents(tmp_path, "others", VOLUME)
    (tmp_path / PRECEDENTS).write_bytes(precedents_file(RECORDS, "others", "others")[PRECEDENTS])
    found = load_precedents(tmp_path, "others", VOLUME).find(RECORDS[3].crystal)
    assert [one.material_id for one in found] == ["TiO2"]


def test_former_rows_beside_new_ones(tmp_path: Path) -> None:
    """Those that could be the same crystals, under another name, are left out."""
    (tmp_path / PRECEDENTS).write_bytes(precedents_file(RECORDS, "others", "others")[PRECEDENTS])
    own = [
        Record("my rutile", rutile(22, 8, 0.31)),
        Record("my BaTiO3", Crystal(99, perovskite(56, 22, 8, 4.0).sites, np.eye(3))),
    ]
    found = unlike(own, former_rows(tmp_path, "others"))
    assert [record.material_id for record in found] == ["SrTiO3", "BaTiO3", "KMgF3", "MnF2"]
    assert unlike(RECORDS, former_rows(tmp_path, "others")) == []


def test_former_rows_are_those_of_the_shipped_table(tmp_path: Path) -> None:
    prior = TemplatePrior.load()
    known = prior.reference
    own = [Record("mine", known.crystal(0))]
    found = unlike(own, former_rows(tmp_path, prior.metadata["source"]["fingerprint"]))
    names = {record.material_id for record in found}
    for row in known.rows_of_formula(known.crystal(0).formula_counts):
        another = known.crystal(row).symmetry_key != known.crystal(0).symmetry_key
        assert (known.material_id(row) in names) == another
    assert len(known) - 9 < len(found) < len(known)


@pytest.mark.parametrize("folder", [*shipped().values(), *shipped_language().values()])
def test_what_is_shipped_names_the_same_rows(folder: Path) -> None:
    """And so needs no file of precedents beside it."""
    trained_on = load_checkpoint(folder).manifest["training_fingerprint"]
    assert is_fingerprint(trained_on)
    assert trained_on == TemplatePrior.load().metadata["source"]["fingerprint"]
    assert not (folder / PRECEDENTS).exists()
    card = (folder / CARD).read_text("utf-8")
    assert set(re.findall("`(?:v2:)?[0-9a-f]{16}`", card)) <= {f"`{trained_on[:19]}`"}


@pytest.mark.parametrize("start", ["914230fd2ef49eb0", "43267ef8110d2da3"])
def test_a_run_of_an_earlier_version_finds_the_shipped_table(start: str, tmp_path: Path) -> None:
    """Whose name for the same rows depended on the processor."""
    (former,) = (name for name in checkpoint._RENAMED if name.startswith(start))
    saved = load_checkpoint(shipped()["crystal_dit_small_fm"])
    save_step(tmp_path, 1, config=saved.config, model=saved.model, fingerprint=former)
    assert load_checkpoint(tmp_path).fingerprint == saved.fingerprint
    _, _, index, _ = read_checkpoint(tmp_path)
    assert index is not None


def test_a_run_folder_finds_those_of_its_latest_step(tmp_path: Path) -> None:
    saved = load_checkpoint(shipped()["crystal_dit_small_fm"])
    save_step(
        tmp_path,
        1,
        config=saved.config,
        model=saved.model,
        fingerprint="others",
        companions=precedents_file(RECORDS, "others", "others"),
    )
    _, _, index, _ = read_checkpoint(tmp_path)
    assert index is not None
    assert [one.material_id for one in index.find(RECORDS[3].crystal)] == ["TiO2"]
