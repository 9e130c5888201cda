"""What responses do: length, repetition, exploratory actions, entropy (the paper's Section 6)."""

from typing import Sequence

import numpy as np

from lab.exploration import Kinds
from lab.reading import Reading
from lab.resampling import bootstrap_problems

NGRAM = 4


def response_figures(readings: Sequence[Reading], kinds: Kinds) -> dict[str, dict]:
    """Each figure of one model's responses, with its interval over problems."""
    ratios = [response_ratios(reading, kinds) for reading in readings]
    names = list(ratios[0])
    problems = 1 + max(reading.problem for reading in readings)
    numerators = np.zeros((problems, len(names)))
    denominators = np.zeros((problems, len(names)))
    for reading, ratio in zip(readings, ratios):
        for column, (numerator, denominator) in enumerate(ratio.values()):
            numerators[reading.problem, column] += numerator
            denominators[reading.problem, column] += denominator

    def quotients(totals: np.ndarray) -> np.ndarray:
        return totals[: len(names)] / totals[len(names) :]

    totals = np.concatenate([numerators, denominators], axis=1)
    return dict(zip(names, bootstrap_problems(quotients, totals)))


def response_ratios(reading: Reading, kinds: Kinds) -> dict[str, tuple[float, float]]:
    """What one response adds to the numerator and to the denominator of each figure."""
    tokens = len(reading.ids)
    # The same tokens again: how much a response goes round in circles.
    ngrams = [tuple(reading.ids[i : i + NGRAM]) for i in range(tokens - NGRAM + 1)]
    repeated = len(ngrams) - len(set(ngrams))

    # Sums, not means: a long response counts for more in the entropy per token.
    pivotal = 0
    pivotal_entropy = 0.0
    for entropy, kind in zip(reading.entropy, reading.kinds):
        if kinds.tokens.get(kind):
            pivotal += 1
            pivotal_entropy += entropy

    reflections = 0
    reflection_tokens = 0
    reflection_entropy = 0.0
    for span in reading.sentences:
        if kinds.sentences.get(span.kind):
            reflections += 1
            reflection_tokens += span.end - span.first
            reflection_entropy += sum(reading.entropy[span.first : span.end])

    return {
        "tokens per response": (tokens, 1),
        f"repeated {NGRAM}-grams, share": (repeated, len(ngrams)),
        "pivotal tokens per response": (pivotal, 1),
        "pivotal tokens per 100 tokens": (100 * pivotal, tokens),
        "reflective actions per response": (reflections, 1),
        "entropy per token": (sum(reading.entropy), tokens),
        "entropy per pivotal token": (pivotal_entropy, pivotal),
        "entropy per token of reflection": (reflection_entropy, reflection_tokens),
    }
