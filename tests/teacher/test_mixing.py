"""Mixtures of several sources' probabilities, against sums over dictionaries in float64."""

import math

import numpy as np
import pytest

from tmjax.teacher.mixing import LEAST_WEIGHT, counts_of, mixed, shares_of_documents
from tmjax.teacher.probabilities import LEAST_REST, TeacherProbabilities

VOCAB, KEEP = 12, 4


def random_part(rng: np.random.Generator, documents: list[list[int]], share: float) -> TeacherProbabilities:
    """Probabilities at a random share of all positions; some lists are padded with weight 0."""
    rows = [(d, p) for d, ids in enumerate(documents) for p in range(len(ids) - 1) if rng.random() < share]
    ids = np.stack([rng.permutation(VOCAB)[:KEEP] for _ in rows]).astype(np.int32)
    weight = rng.dirichlet(np.full(KEEP + 1, 0.5), len(rows))[:, :KEEP].astype(np.float32)
    weight = -np.sort(-weight, axis=1)
    weight[rng.random(len(rows)) < 0.3, -1] = 0.0
    return TeacherProbabilities(*np.asarray(rows, np.int32).T, ids, weight)


def listed(part: TeacherProbabilities) -> dict[tuple[int, int], dict[int, float]]:
    """Probabilities by token at every position."""
    rows = zip(part.document.tolist(), part.position.tolist(), part.ids.tolist(), part.weight.tolist(), strict=True)
    return {(d, p): {i: w for i, w in zip(ids, weight, strict=True) if w > 0} for d, p, ids, weight in rows}


def log_of_next(at: dict[int, float], token: int) -> float:
    return math.log(max(at.get(token, 0.0), min(max(1 - sum(at.values()), LEAST_REST), 1.0) / VOCAB))


def truth(
    parts, prior, documents
) -> tuple[dict[tuple[int, int], dict[int, float]], dict[tuple[int, int], list[float]]]:
    """The mixture and its weights, position by position; `documents` None: weights are the prior."""
    every = [listed(part) for part in parts]
    result, weights, evidence = {}, {}, {}
    for place in sorted(set().union(*every)):
        document, position = place
        own = evidence.setdefault(document, [math.log(weight) for weight in prior])
        scale = [math.exp(e) if place in part else 0.0 for e, part in zip(own, every, strict=True)]
        if documents is not None and sum(scale) < LEAST_WEIGHT * sum(map(math.exp, own)):
            continue
        scale = [value / sum(scale) for value in scale]
        weights[place], result[place] = scale, {}
        for value, part in zip(scale, every, strict=True):
            for token, weight in part.get(place, {}).items():
                result[place][token] = result[place].get(token, 0.0) + value * weight
        if documents is not None and all(place in part for part in every):
            token = documents[document][position + 1]
            evidence[document] = [e + log_of_next(part[place], token) for e, part in zip(own, every, strict=True)]
    return result, weights


@pytest.mark.parametrize("by_prediction", [False, True])
@pytest.mark.parametrize("prior", [(1.0, 1.0), (0.2, 0.7), (3.0, 1.0, 0.5)])
def test_mixtures_are_sums_over_tokens(by_prediction, prior) -> None:
    rng = np.random.default_rng(len(prior))
    documents = [rng.integers(VOCAB, size=length).tolist() for length in (9, 2, 14, 5)]
    parts = [random_part(rng, documents, 0.8) for _ in prior]
    options = {"documents": documents, "vocab": VOCAB} if by_prediction else {}
    wanted, weights = truth(parts, prior, documents if by_prediction else None)
    result = mixed(parts, np.asarray(prior), keep=KEEP * len(parts), **options)
    found = listed(result.probabilities)
    assert found.keys() == wanted.keys() and list(found) == sorted(found)
    for place, tokens in wanted.items():
        assert found[place] == pytest.approx(tokens, abs=1e-6)
    np.testing.assert_allclose(result.shares, np.mean(list(weights.values()), axis=0), atol=1e-9)
    # Where one source is alone, its list stays as it is.
    every = [listed(part) for part in parts]
    alone = [place for place in wanted if sum(place in part for part in every) == 1]
    assert alone and (by_prediction or len(wanted) == len(set().union(*every)))
    for place in alone:
        (own,) = [part[place] for part in every if place in part]
        assert found[place] == own


def test_tokens_beyond_the_kept_ones_join_the_remainder() -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(VOCAB, size=30).tolist()]
    parts = [random_part(rng, documents, 1.0) for _ in range(2)]
    wanted, _ = truth(parts, (1.0, 1.0), None)
    found = mixed(parts, np.ones(2), keep=3).probabilities
    assert found.ids.shape == (29, 3) and found.ids.dtype == np.int32 and found.weight.dtype == np.float32
    for row, tokens in enumerate(wanted.values()):
        np.testing.assert_allclose(found.weight[row], sorted(tokens.values(), reverse=True)[:3], rtol=1e-6)


def test_a_source_that_predicts_badly_loses_its_weight() -> None:
    """The better source has nine tenths of the mass on the next token, the worse one a tenth."""
    documents = [[0, 1, 2, 3, 4, 5, 6, 7]] * 5
    rows = [(d, p) for d in range(5) for p in range(7)]
    at = np.asarray(rows, np.int32).T
    ids = np.asarray([[documents[d][p + 1], 9] for d, p in rows], np.int32)
    good, bad = (TeacherProbabilities(*at, ids, np.full((35, 2), w, np.float32)) for w in ([0.9, 0.05], [0.1, 0.85]))
    shares = shares_of_documents([good, bad], documents, np.ones(2), VOCAB)
    assert shares[0] > 1 - 1e-9 and shares.sum() == pytest.approx(1)
    fixed, predicted = (mixed([good, bad], np.ones(2), keep=2, **o) for o in ({}, {"documents": documents, "vocab": 9}))
    assert fixed.shares.tolist() == [0.5, 0.5] and predicted.shares[0] > 0.9
    np.testing.assert_allclose(predicted.probabilities.weight[:2, 0], [0.5, 0.9 * 0.9 + 0.1 * 0.1], rtol=1e-6)


def test_documents_of_two_kinds_are_shared_out() -> None:
    documents = [[0, 1, 2, 3, 4]] * 3 + [[0, 5, 6, 7, 8]]
    rows = [(d, p) for d in range(4) for p in range(4)]
    at = np.asarray(rows, np.int32).T
    parts = [
        TeacherProbabilities(*at, np.asarray([[told[p + 1]] for _, p in rows], np.int32), np.full((16, 1), 0.9))
        for told in (documents[0], documents[3])
    ]
    shares = shares_of_documents(parts, documents, np.asarray([1.0, 5.0]), VOCAB)
    np.testing.assert_allclose(shares, [0.75, 0.25], atol=1e-4)


def test_sources_without_a_common_position_keep_their_prior() -> None:
    def part(position: int) -> TeacherProbabilities:
        one = np.zeros(1, np.int32)
        return TeacherProbabilities(one, one + position, one[:, None], np.ones((1, 1), np.float32))

    shares = shares_of_documents([part(0), part(1)], [[0, 0, 0]], np.asarray([1.0, 3.0]), VOCAB)
    assert shares.tolist() == [0.25, 0.75]


@pytest.mark.parametrize("total", [0, 1, 10, 3000])
def test_counts_are_whole_and_of_their_sum(total) -> None:
    shares = np.random.default_rng(total).dirichlet(np.ones(3))
    counts = counts_of(total, shares)
    assert sum(counts) == total and max(abs(c - total * s) for c, s in zip(counts, shares, strict=True)) < 1
    assert counts_of(10, np.asarray([1.0, 0.0])) == [10, 0] and counts_of(3, np.asarray([0.5, 0.5])) == [2, 1]
