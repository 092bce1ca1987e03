"""ROUGE of answers against references, by the two libraries that published numbers come from.

- ``rouge_score`` (Google): words are runs of a-z and 0-9 after lowering the case, no stemming.
- ``rouge_chinese``, as MindFormers' ADGENMetric and GLM-4's own fine-tuning code use it: words are
  what jieba cuts, joined by blanks. Case and punctuation count. ROUGE-1 and 2 count a word or pair
  once however often it stands there, ROUGE-L counts all; so here, and only here, ROUGE-L can be
  above ROUGE-1, as it is in the paper's table.

All are F1 in percent, averaged over the answers. An empty answer, which MindFormers leaves out of
the average, counts as zero here. ROUGE rewards text, not crystallography: a wrong space group costs
one word. It stands beside the rates of ``symmetry_prediction``, never in their place.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jieba
import numpy as np
from rouge_chinese import Rouge
from rouge_score.rouge_scorer import RougeScorer

NAMES = ("rouge-1", "rouge-2", "rouge-l")

#: Called with the number of answers that are done, and of all.
Progress = Callable[[int, int], None]


def rouge(
    answers: Sequence[str], references: Sequence[str], progress: Progress | None = None
) -> dict[str, dict[str, float]]:
    """Mean F1 in percent by library and name; see the module.

    Args:
        answers: what a model wrote.
        references: what it should have written, one for each.
        progress: called after each of them.

    Returns:
        ``{"rouge_score": {"rouge-1": ...}, "rouge_chinese": ...}``.

    Raises:
        ValueError: if there is nothing, or the numbers differ.
    """
    if not answers or len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers for {len(references)} references")
    measures = {"rouge_score": _by_rouge_score(), "rouge_chinese": _by_rouge_chinese()}
    scores: dict[str, list[tuple[float, ...]]] = {library: [] for library in measures}
    for done, (answer, reference) in enumerate(zip(answers, references, strict=True), start=1):
        for library, measure in measures.items():
            scores[library].append(measure(answer, reference))
        if progress is not None:
            progress(done, len(answers))
    return {
        library: dict(zip(NAMES, (100 * np.mean(rows, axis=0)).tolist(), strict=True))
        for library, rows in scores.items()
    }


_Measure = Callable[[str, str], tuple[float, ...]]


def _by_rouge_score() -> _Measure:
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=False)

    def measure(answer: str, reference: str) -> tuple[float, ...]:
        found = scorer.score(reference, answer)
        return tuple(found[kind].fmeasure for kind in kinds)

    return measure


def _by_rouge_chinese() -> _Measure:
    words = jieba_words()
    scorer = Rouge()

    def measure(answer: str, reference: str) -> tuple[float, ...]:
        cut = words(answer), words(reference)
        if not all(text.strip() for text in cut):
            return (0.0,) * len(NAMES)
        (found,) = scorer.get_scores(*cut)
        return tuple(found[name]["f"] for name in NAMES)

    return measure


@lru_cache(maxsize=1)
def jieba_words() -> Callable[[str], str]:
    """What cuts text into words, joined by blanks; loads a dictionary, which takes a second."""
    cutter: Any = jieba.Tokenizer()
    # Its initialize() keeps the dictionary in a file for the next time, and is no faster then.
    cutter.FREQ, cutter.total = cutter.gen_pfdict(cutter.get_dict_file())
    cutter.initialized = True
    return lambda text: " ".join(cutter.cut(text))
