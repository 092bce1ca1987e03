"""ROUGE against its definition, on words that are cut as documented."""

import functools
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cli import run
from common.evaluate.language import jieba_words, rouge
from common.language.prompt import Symmetry, write_answer
from tests.symmetries import symmetries


def f1(same: int, answer: int, reference: int) -> float:
    return 100 * 2 * same / (answer + reference) if same else 0.0


def by_definition(
    answer: Sequence[str], reference: Sequence[str], distinct: bool = False
) -> list[float]:
    """ROUGE-1, 2 and L of words: shared n-grams, each as often as in both; longest subsequence.

    ``distinct`` counts every n-gram once.
    """
    scores = []
    for n in (1, 2):
        grams = [
            Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
            for words in (answer, reference)
        ]
        if distinct:
            grams = [Counter(set(counted)) for counted in grams]
        scores.append(f1((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total()))

    @functools.cache
    def longest(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return 0
        if answer[i - 1] == reference[j - 1]:
            return 1 + longest(i - 1, j - 1)
        return max(longest(i - 1, j), longest(i, j - 1))

    same = longest(len(answer), len(reference))
    return [*scores, f1(same, len(answer), len(reference))]


def letters_and_digits(text: str) -> list[str]:
    """rouge-score's words."""
    return re.findall(r"[a-z0-9]+", text.lower())


def latin_words(text: str) -> list[str]:
    """jieba's words of the text that ``prompt`` writes; blanks and line feeds fall away."""
    return re.findall(r"[A-Za-z0-9]+|[^A-Za-z0-9\s]", text)


@given(st.lists(st.tuples(symmetries(), symmetries()), min_size=1, max_size=2))
@settings(max_examples=12)
def test_scores_follow_the_definition(pairs: list[tuple[Symmetry, Symmetry]]) -> None:
    answers = [write_answer(first) for first, _ in pairs]
    references = [write_answer(second) for _, second in pairs]
    found = rouge(answers, references)
    for library, words, distinct in (
        ("rouge_score", letters_and_digits, False),
        ("rouge_chinese", latin_words, True),
    ):
        rows = [
            by_definition(words(answer), words(reference), distinct)
            for answer, reference in zip(answers, references, strict=True)
        ]
        expected = np.mean(rows, axis=0).tolist()
        assert list(found[library].values()) == pytest.approx(expected, abs=1e-3)


@given(symmetries())
@settings(max_examples=30)
def test_words_are_cut_as_documented(symmetry: Symmetry) -> None:
    text = write_answer(symmetry)
    assert jieba_words()(text).split() == latin_words(text)


def test_best_and_worst() -> None:
    text = write_answer(Symmetry.of(225, [(11, "a"), (17, "b")]))
    perfect = rouge([text], [text])
    assert all(score == pytest.approx(100) for row in perfect.values() for score in row.values())
    done: list[tuple[int, int]] = []
    nothing = rouge(["", "?"], [text, text], lambda *counts: done.append(counts))
    assert all(score == 0 for row in nothing.values() for score in row.values())
    assert done == [(1, 2), (2, 2)]
    half = rouge([text, ""], [text, text])
    assert half["rouge_chinese"]["rouge-l"] == pytest.approx(50)


def test_longest_subsequence_can_score_above_single_words() -> None:
    """Only where repeated words count once: four of five words right, two of three kinds."""
    found = rouge(["a b a b c"], ["a b a b d"])
    assert found["rouge_chinese"]["rouge-1"] == pytest.approx(100 * 2 / 3)
    assert found["rouge_chinese"]["rouge-l"] == pytest.approx(80)
    assert found["rouge_score"]["rouge-1"] == pytest.approx(80)


def test_nothing_is_written_nor_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Texts are compared after hours of ranking, when a cache that cannot be written is no news."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "cache").touch()
    monkeypatch.setenv("UNI_MDM_CACHE", str(tmp_path / "cache"))
    jieba_words.cache_clear()
    words = jieba_words()
    # Of an ambiguous text, by the dictionary.
    assert words("Pm-3m 南京市长江大桥").split() == ["Pm", "-", "3m", "南京市", "长江大桥"]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize(("answers", "references"), [([], []), (["a"], ["a", "b"])])
def test_unequal_numbers_are_refused(answers: list[str], references: list[str]) -> None:
    with pytest.raises(ValueError, match="answers for"):
        rouge(answers, references)


@pytest.mark.parametrize("package", ["jieba", "rouge_chinese", "rouge_score"])
def test_missing_package_is_told_before_anything_is_evaluated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    for module in ("language", "symmetry_run"):
        monkeypatch.delitem(sys.modules, f"common.evaluate.{module}", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert run(["evaluate", "symmetry", "--data", "absent.csv"]) == 2
    assert f"package '{package}' is not installed" in capsys.readouterr().err
