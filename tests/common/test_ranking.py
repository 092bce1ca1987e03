"""Who ranks a query's symmetries, under what is fixed, and what follows where it says little."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common import ranking
from common.cli import run
from common.commands import evaluate
from common.crystal.structure import Crystal, Site
from common.crystal.wyckoff import wyckoff_summary
from common.data.store import Record
from common.errors import UserError
from common.language.config import LanguageRunConfig
from common.pipeline import make_query
from common.prior import SymmetryCandidate, TemplatePrior
from common.prior_fit import fit_prior
from common.ranking import (
    PRIOR,
    PRIOR_NAME,
    Ranker,
    averaged,
    beside_known,
    load_ranker,
    model_folder,
    pooled,
    rank_symmetries,
    sharpened,
)
from tests.language import language_run

LANGUAGE = "language model"

#: Counts by atomic number, and properties.
Row = tuple[dict[int, int], dict[str, float]]


@pytest.fixture(scope="module")
def ranker(textbook_model: Path) -> Ranker:
    return load_ranker([], textbook_model)


def check(found: list[SymmetryCandidate], count: int) -> None:
    """So many different symmetries in the order of their probabilities, which are of one whole."""
    probabilities = [candidate.probability for candidate in found]
    assert len({candidate.key for candidate in found}) == len(found) == count
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) <= 1 + 1e-9


# Ranking


def test_language_model_ranks(ranker: Ranker) -> None:
    found = rank_symmetries(make_query("NaCl"), ranker, 5)
    check(found, 5)
    assert LANGUAGE in {candidate.source for candidate in found}
    assert found[0].space_group == 225, "a textbook crystal that it was shown"
    prior = rank_symmetries(make_query("NaCl"), Ranker(ranker.prior), 5)
    assert [c.key for c in prior] != [c.key for c in found]


def test_number_shown_changes_nothing(ranker: Ranker) -> None:
    query = make_query("SrTiO3", 1.8)
    assert rank_symmetries(query, ranker, 1) == rank_symmetries(query, ranker, 20)[:1]


def test_many_at_once_are_ranked_alike(ranker: Ranker) -> None:
    queries = [make_query("NaCl", 5.0), make_query("SrTiO3"), make_query("KBr")]
    together = ranker.rank([(q.formula.counts, q.properties) for q in queries], 5)
    for query, found in zip(queries, together, strict=True):
        alone = rank_symmetries(query, ranker, 5)
        assert [c.key for c in alone] == [c.key for c in found]
        for a, b in zip(alone, found, strict=True):
            assert a.probability == pytest.approx(b.probability, rel=1e-3)


def test_property_is_told(ranker: Ranker) -> None:
    """To the language model, which alone ranks: no crystal of NaCl is known to the prior."""
    ranker = replace(ranker, share=1.0)
    queries = [make_query("NaCl", x) for x in (0.0, 6.0)]
    assert not ranker.prior.known_symmetries(queries[0].formula.counts)
    alone = [rank_symmetries(query, ranker, 5) for query in queries]
    together = ranker.rank([(query.formula.counts, query.properties) for query in queries], 5)
    for first, second in (alone, together):
        assert {c.source for c in (*first, *second)} == {LANGUAGE}
        after = {c.key: c.probability for c in second}
        assert {c.key: c.probability for c in first} != pytest.approx(after, rel=1e-3)


def test_space_group_is_a_condition(ranker: Ranker) -> None:
    """What remains is divided among fewer, in the same proportions, by the model alone.

    Known crystals of CsPbBr3 have other groups.
    """
    ranker = replace(ranker, share=1.0)
    everything = {c.key: c for c in rank_symmetries(make_query("CsPbBr3"), ranker, 20)}
    found = rank_symmetries(make_query("CsPbBr3", space_group=221), ranker, 3)
    check(found, 3)
    assert {c.space_group for c in found} == {221}
    assert {c.source for c in found} == {LANGUAGE}
    before = {name: c.probability for name, c in everything.items() if c.probability > 0}
    ratios = [c.probability / before[c.key] for c in found if c.key in before]
    assert len(ratios) >= 2
    assert min(ratios) > 1
    # A symmetry that can be written in several ways may have been met in one of them only.
    assert ratios[:2] == pytest.approx([min(ratios)] * 2, rel=1e-3)


def test_units_are_a_condition(ranker: Ranker) -> None:
    found = rank_symmetries(make_query("SrTiO3", z=4), ranker, 5)
    assert {c.z for c in found} == {4}
    assert LANGUAGE in {c.source for c in found}
    for candidate in rank_symmetries(make_query("Sr2Ti2O6"), ranker, 5):
        assert candidate.z in (2, 2 * wyckoff_summary(candidate.space_group).centering)


@pytest.mark.parametrize("sites", ["Cs:b Pb:a Br:d", "Cs:1b Pb:1a Br:3d"])
def test_sites_are_a_condition(ranker: Ranker, sites: str) -> None:
    """Their letters stay, although other letters say the same.

    Known crystals of CsPbBr3 have other sites.
    """
    found = rank_symmetries(make_query("CsPbBr3", sites=sites), ranker, 100)
    groups = [candidate.space_group for candidate in found]
    assert 221 in groups
    assert len(set(groups)) == len(groups)
    assert found[0].source == LANGUAGE
    for candidate in found:
        assert set(candidate.sites) == {(55, "b"), (82, "a"), (35, "d")}
    if "1b" in sites:
        table = [wyckoff_summary(group).letters for group in groups]
        assert {(t["b"][0], t["a"][0], t["d"][0]) for t in table} == {(1, 1, 3)}


def test_letters_are_those_of_the_prior(ranker: Ranker) -> None:
    """So that the noise of a symmetry does not depend on who ranks."""
    known = {
        c.key: c.sites
        for c in rank_symmetries(make_query("SrTiO3"), Ranker(ranker.prior), 100)
        if c.source == "template"
    }
    found = rank_symmetries(make_query("SrTiO3"), ranker, 20)
    shared = [c for c in found if c.key in known]
    assert len(shared) >= 3
    assert all(c.sites == known[c.key] for c in shared)


@pytest.mark.parametrize(("share", "first"), [(1.0, LANGUAGE), (0.0, "template")])
def test_share_of_the_model(ranker: Ranker, share: float, first: str) -> None:
    """Whoever has no say comes last, with what the other does not list."""
    found = rank_symmetries(make_query("NaCl"), replace(ranker, share=share), 30)
    check(found, 30)
    listed = [candidate for candidate in found if candidate.probability > 0]
    assert listed[0].source in (first, LANGUAGE)
    assert all(candidate.probability == 0 for candidate in found[len(listed) :])
    alone = rank_symmetries(make_query("NaCl"), Ranker(ranker.prior), 20)
    assert ([c.key for c in listed[:20]] == [c.key for c in alone]) == (share == 0)


def test_prior_answers_what_the_model_cannot() -> None:
    """200 atoms in the primitive cell are more than its answers may have."""
    query = make_query("SrTiO3", space_group=1, z=40)

    class Refusing:
        name = "refusing"
        analogues = 6

    prior = TemplatePrior.load()
    (found,) = rank_symmetries(query, Ranker(prior, Refusing()), 1)  # type: ignore[arg-type]
    assert found.source != LANGUAGE


def test_nothing_legal(ranker: Ranker) -> None:
    with pytest.raises(UserError, match="cannot be placed"):
        rank_symmetries(make_query("NaCl", space_group=227, z=3), ranker, 5)
    with pytest.raises(UserError, match=r"space group 230, at most 120 atoms in the primitive"):
        rank_symmetries(make_query("SiH119", space_group=230), ranker, 5)


def candidate(group: int, letters: str, probability: float) -> SymmetryCandidate:
    sites = ((11, letters[0]), (17, letters[1]))
    return SymmetryCandidate(group, sites, 4, probability, "template")


def test_two_rankings_as_one() -> None:
    """Cl on 4a and Na on 4b is the first's rock salt."""
    first = [candidate(225, "ab", 0.4), candidate(216, "ac", 0.1)]
    others = [candidate(225, "ba", 0.5), candidate(221, "ab", 0.3), candidate(194, "ac", 0.1)]
    found = pooled(first, others, 0.75)
    assert [c.space_group for c in found] == [225, 216, 221, 194]
    assert [c.probability for c in found] == pytest.approx([0.425, 0.075, 0.075, 0.025])
    assert found[0].sites == first[0].sites
    assert [c.space_group for c in pooled(first, others, 0.1)] == [225, 221, 194, 216]
    assert pooled([], others, 0.75) == others
    assert pooled(first, [], 0.75) == first


def test_sharper_probabilities_sum_to_the_same() -> None:
    ranking = [candidate(225, "ab", 0.6), candidate(216, "ac", 0.2), candidate(221, "ab", 0.0)]
    found = sharpened(ranking, 2.0)
    assert [c.key for c in found] == [c.key for c in ranking]
    assert [c.probability for c in found] == pytest.approx([0.72, 0.08, 0.0])
    assert [c.probability for c in sharpened(ranking, 1.0)] == pytest.approx([0.6, 0.2, 0.0])
    assert sharpened([], 2.0) == []
    others = [candidate(216, "ac", 0.2)]
    assert averaged(ranking, others, 0.5, 2.0) == sharpened(pooled(ranking, others, 0.5), 2.0)
    assert averaged(ranking, [], 0.5, 2.0) == ranking, "one forecast alone is sharp enough"
    assert averaged([], others, 0.5, 2.0) == others


def test_known_polymorphs_keep_what_the_prior_gives_them() -> None:
    """The rest is averaged, as if it were all."""
    first = [candidate(216, "ac", 0.8), candidate(194, "ac", 0.2)]
    ranked = [candidate(225, "ba", 0.5), candidate(216, "ac", 0.1), candidate(221, "ab", 0.4)]
    known = {candidate(225, "ab", 1.0).key}
    found = beside_known(first, ranked, known, 0.25, 1.0)
    assert [c.space_group for c in found] == [225, 221, 216, 194]
    assert [c.probability for c in found] == pytest.approx([0.5, 0.3, 0.175, 0.025])
    sharper = beside_known(first, ranked, known, 0.25, 2.0)
    whole = 0.6**2 + 0.35**2 + 0.05**2
    parts = [0.5, *(0.5 * p**2 / whole for p in (0.6, 0.35, 0.05))]
    assert [c.probability for c in sharper] == pytest.approx(parts)
    assert beside_known(first, ranked, set(), 0.25, 2.0) == averaged(first, ranked, 0.25, 2.0)
    assert beside_known([], ranked, known, 0.25, 2.0) == ranked
    everything = {c.key for c in ranked}
    assert beside_known(first, ranked, everything, 0.25, 2.0) == averaged(first, ranked, 0.25, 2.0)


def test_model_that_is_told_of_no_polymorph_is_averaged_whole() -> None:
    """It was not asked for another one, and so what it says of known ones counts as well."""
    first = [candidate(225, "ab", 0.8), candidate(194, "ac", 0.2)]
    ranked = [candidate(225, "ba", 0.5), candidate(221, "ab", 0.5)]
    known = {candidate(225, "ab", 1.0).key}
    prior = TemplatePrior.load()
    untold = Ranker(prior, SimpleNamespace(analogues=0))  # type: ignore[arg-type]
    told = Ranker(prior, SimpleNamespace(analogues=6))  # type: ignore[arg-type]
    assert untold.combined(first, ranked, known) == untold.combined(first, ranked)
    assert told.combined(first, ranked, known) != told.combined(first, ranked)


def test_one_composition_too_large_takes_no_other_with_it(ranker: Ranker) -> None:
    """The prior ranks it; the model is asked about the others."""
    large: Row = ({1: 100, 6: 61}, {})
    small: Row = ({11: 1, 17: 1}, {})
    alone, among = ranker.rank([small], 5), ranker.rank([large, small, large], 5)
    assert among[1] == alone[0]
    assert among[0] == among[2] == Ranker(ranker.prior).rank([large], 5)[0]
    assert ranker.rank([large], 5) == among[:1]


def test_new_and_any_at_once(ranker: Ranker) -> None:
    rows: list[Row] = [({38: 1, 22: 1, 8: 3}, {"band_gap": 1.8}), ({11: 1, 17: 1}, {})]
    new, of_any = ranker.rank_both(rows, 5)
    assert new == ranker.rank(rows, 5, only_new=True)
    assert of_any == ranker.rank(rows, 5)
    assert new[0] != of_any[0], "SrTiO3 has a known polymorph"


def test_shipped_model_is_told_of_known_polymorphs() -> None:
    """It seldom names them, and so they keep what the prior gives them, asked alone or not."""
    query = make_query("SrTiO3")
    ranker = replace(load_ranker([], "glm4"), share=1.0)
    ((group, sites),) = ranker.prior.known_symmetries(query.formula.counts)
    assert group == 221
    (together, _) = ranker.rank([(query.formula.counts, {}), ({11: 1, 17: 1}, {})], 20)
    rankings = (
        rank_symmetries(query, Ranker(ranker.prior), 20),
        rank_symmetries(query, ranker, 20),
        together,
    )
    plain, alone, company = (
        next(c.probability for c in found if c.key == (group, sites)) for found in rankings
    )
    # Untold it would say that of nearly half of what the prior leaves.
    assert plain <= alone < plain + 0.1
    assert company == pytest.approx(alone, rel=1e-3)


def test_a_model_beside_ones_own_prior_is_told_of_its_crystals() -> None:
    """Here not of cubic SrTiO3, which the shipped prior knows, and which it would not name then."""
    sites = tuple(Site(z, letter) for z, letter in ((19, "b"), (12, "a"), (9, "c")))
    own = fit_prior([Record("KMgF3", Crystal(221, sites, 4.0 * np.eye(3)))])
    shipped = load_ranker([], "glm4")
    counts = {38: 1, 22: 1, 8: 3}
    (ranked,) = replace(shipped, prior=own, share=1.0).rank([(counts, {})], 5)
    assert ranked[0].space_group == 221
    ((told, *_),) = replace(shipped, share=1.0).rank([(counts, {})], 5, only_new=True)
    assert told.space_group != 221
    query = make_query("SrTiO3")
    assert rank_symmetries(query, replace(shipped, prior=own, share=1.0), 5)[0].key == ranked[0].key


def test_known_polymorphs_are_left_out(ranker: Ranker) -> None:
    """Where they are told of, and another symmetry is wanted."""
    counts = {38: 1, 22: 1, 8: 3}
    prior = ranker.prior
    rows = [(counts, {})]
    ((first, *_),) = Ranker(prior).rank(rows, 20)
    (others,) = Ranker(prior).rank(rows, 20, only_new=True)
    assert first.space_group == 221
    assert first.key not in [c.key for c in others if c.probability > 0]
    (both,) = ranker.rank(rows, 20, only_new=True)
    assert both != ranker.rank(rows, 20)[0]


# Choice of the model


def test_identity(ranker: Ranker) -> None:
    assert ranker.identity == {
        "name": f"run and {PRIOR_NAME}",
        "hash": f"{ranker.model.name}, {ranker.prior.hash}",
    }
    prior = load_ranker([], PRIOR)
    assert prior.identity == {"name": PRIOR_NAME, "hash": prior.prior.hash}


def test_shipped_model_for_the_property(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def load(folder: Path, backend: str, base: Path | None, device: str) -> object:
        asked.append(folder)
        raise ModuleNotFoundError(name="transformers.models")

    monkeypatch.setattr(ranking, "load_language_model", load)
    folders = {n: Path("/absent") / n for n in ("glm4_tiny", "glm4_tiny_bg", "other")}
    monkeypatch.setattr(ranking, "shipped_language", lambda: folders)
    for properties in (["band_gap"], ["formation_energy"], []):
        assert load_ranker(properties, "glm4").model is None
    assert "is not used, the template prior ranks" in load_ranker(["band_gap"]).note
    names = ["glm4_tiny_bg", "glm4_tiny", "glm4_tiny", "glm4_tiny_bg"]
    assert [path.name for path in asked] == names
    assert model_folder("band_gap", "other") == folders["other"]
    assert model_folder("band_gap", "runs/mine") == Path("runs/mine")
    with pytest.raises(UserError, match=r"'elsewhere' .* shipped: glm4_tiny, glm4_tiny_bg, other$"):
        model_folder("band_gap", "elsewhere")
    own = TemplatePrior.load()
    assert load_ranker(["band_gap"], prior=own) == Ranker(own), "one's own prior ranks alone"
    monkeypatch.setattr(ranking, "shipped_language", lambda: {"other": Path("x")})
    with pytest.raises(UserError, match="no language model is shipped"):
        load_ranker(["band_gap"], "glm4")
    monkeypatch.setattr(ranking, "shipped_language", dict)
    assert load_ranker(["band_gap"]).note == ""
    assert len(asked) == 4


def test_missing_packages(textbook_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and no hidden bugs."""

    def load(folder: Path, backend: str, base: Path | None, device: str) -> object:
        raise ModuleNotFoundError(name=missing)

    missing = "transformers.models"
    monkeypatch.setattr(ranking, "load_language_model", load)
    asked = load_ranker([], textbook_model)
    assert asked.model is None
    assert "'transformers' is not installed" in asked.note
    assert "\n" not in asked.note
    missing = "common.absent"
    with pytest.raises(ModuleNotFoundError):
        load_ranker([], textbook_model)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_device_of_the_language_model(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both commands that evaluate it, the network's."""
    asked: list[str] = []

    def load(folder: Path, backend: str, base: Path | None, device: str) -> object:
        asked.append(device)
        raise UserError("seen")

    def network(folder: Path, backend: str, device: str) -> object:
        asked.append(device)
        return SimpleNamespace(properties=())

    monkeypatch.setattr(ranking, "load_language_model", load)
    monkeypatch.setattr(evaluate, "load_generator", network)
    assert run(["evaluate", "symmetry", "--device", device]) == 2
    assert asked == [device]
    assert run(["evaluate", "--given", "composition", "--device", device]) == 2
    assert asked == [device] * 3


def test_absent_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        load_ranker([], tmp_path / "absent")
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError, match="notes"):
        load_ranker([], tmp_path / "notes")


def test_adapter_finds_its_base_among_the_shipped(
    textbook_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it was trained."""
    from torch_impl.backend import train_language

    base = tmp_path / "base"
    shutil.copytree(textbook_model, base)
    parquet = textbook_model.parents[1] / "textbook.parquet"
    config = language_run(parquet, init_from=str(base), questions=["band_gap"])
    config = LanguageRunConfig.model_validate(config.model_dump() | {"lora": {"rank": 2}})
    train_language(config, tmp_path / "adapter", device="cpu")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="base"):
        load_ranker(["band_gap"], tmp_path / "adapter")
    monkeypatch.setattr(ranking, "shipped_language", lambda: {"glm4_tiny": tmp_path / "elsewhere"})
    found = load_ranker(["band_gap"], tmp_path / "adapter")
    assert found.model is not None
    assert found.name == "adapter"
