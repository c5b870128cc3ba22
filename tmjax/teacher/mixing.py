"""Mixtures of the probabilities that several sources give to the target's next tokens.

A mixture has every position of every source. At a position it is the weighted mean of the sources that have it, with
their weights scaled to sum 1: p(x) = sum_k w_k p_k(x). Probability that a source leaves to unlisted tokens stays
unlisted. Weights are given ones, or follow the prediction of the text so far; then a position is left out where the
sources that have it are nearly without weight.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tmjax.teacher.probabilities import TeacherProbabilities, next_tokens, sum_by_token

#: Rounds of expectation maximisation for shares of documents.
ROUNDS = 100
#: Least weight of the sources that have a position, among all sources, with weights by prediction.
LEAST_WEIGHT = 0.05
#: Least share of a source, whose logarithm is finite.
LEAST_SHARE = 1e-12


class Places(NamedTuple):
    """Positions that any of K sources has, in the order of documents and positions.

    Attributes:
        document: Number of the text, int32 [N].
        position: Position in the target's tokens, int32 [N].
        row: Row of every source at the position, int [K, N]; -1 where the source has none.
    """

    document: np.ndarray
    position: np.ndarray
    row: np.ndarray

    @property
    def shared(self) -> np.ndarray:
        """Whether all sources have the position, bool [N]."""
        return (self.row >= 0).all(axis=0)


class Mixture(NamedTuple):
    """A mixture, and the mean weight of every source over its positions [K]."""

    probabilities: TeacherProbabilities
    shares: np.ndarray


def places_of(parts: Sequence[TeacherProbabilities]) -> Places:
    """Finds the positions of several sources on the same texts.

    Args:
        parts: Probabilities of every source.

    Returns:
        All positions.
    """
    span = 1 + max(int(part.position.max()) for part in parts)
    keys = [part.document.astype(np.int64) * span + part.position for part in parts]
    every = np.unique(np.concatenate(keys))
    rows = np.full((len(parts), len(every)), -1, np.int64)
    for number, own in enumerate(keys):
        rows[number, np.searchsorted(every, own)] = np.arange(len(own))
    return Places((every // span).astype(np.int32), (every % span).astype(np.int32), rows)


def _log_likelihoods(
    parts: Sequence[TeacherProbabilities], places: Places, documents: Sequence[Sequence[int]], vocab: int
) -> np.ndarray:
    """Returns every source's log-probability of the next token, float64 [K, N]; 0 where not all sources have one.

    Sums over different positions say nothing about which source predicts better.
    """
    shared = places.shared
    result = np.zeros(places.row.shape)
    for number, part in enumerate(parts):
        own = part.log_probability(next_tokens(part, documents), vocab)
        result[number, shared] = own[places.row[number, shared]]
    return result


def _starts(places: Places) -> np.ndarray:
    """Returns the number of the first position of every position's document, int [N]."""
    _, first, inverse = np.unique(places.document, return_index=True, return_inverse=True)
    return first[inverse]


def predictive_weights(log_kn: np.ndarray, places: Places, prior_k: np.ndarray) -> np.ndarray:
    """Weighs sources by their prediction of each document so far (Bayesian model averaging).

    w_k(t) is proportional to prior_k exp(sum over s < t of log p_k(x_s)). The sum is over positions before t in the
    document that all sources have.

    Args:
        log_kn: Log-probabilities of the next tokens, 0 where not all sources have one [K, N].
        places: The positions.
        prior_k: Weights at the beginning of a document [K].

    Returns:
        Weights of sum 1 at every position, whether or not the source has it, float64 [K, N].
    """
    before = np.cumsum(log_kn, axis=1) - log_kn
    evidence = before - before[:, _starts(places)] + np.log(np.maximum(prior_k, LEAST_SHARE))[:, None]
    weight_kn = np.exp(evidence - evidence.max(axis=0))
    return weight_kn / weight_kn.sum(axis=0)


def shares_of_documents(
    parts: Sequence[TeacherProbabilities], documents: Sequence[Sequence[int]], prior_k: np.ndarray, vocab: int
) -> np.ndarray:
    """Estimates the share of documents that each source predicts best.

    The documents are taken as drawn from a mixture of the sources, whose weights expectation maximisation fits: the
    posterior of source k given document d is proportional to share_k p_k(d), and share_k is its mean over documents.

    Args:
        parts: Probabilities of every source.
        documents: Token ids of every document as it is scored.
        prior_k: Shares that the iteration begins with [K].
        vocab: Size of the target's vocabulary.

    Returns:
        Shares of sum 1, float64 [K]; the prior where the sources share no position.
    """
    places, shares = places_of(parts), prior_k / prior_k.sum()
    log_kn = _log_likelihoods(parts, places, documents, vocab)
    number = np.unique(places.document[places.shared], return_inverse=True)[1]
    if not len(number):
        return shares
    log_kd = np.stack([np.bincount(number, own[places.shared]) for own in log_kn])
    for _ in range(ROUNDS):
        evidence = log_kd + np.log(np.maximum(shares, LEAST_SHARE))[:, None]
        posterior = np.exp(evidence - evidence.max(axis=0))
        shares = (posterior / posterior.sum(axis=0)).mean(axis=1)
    return shares


def mixed(
    parts: Sequence[TeacherProbabilities],
    prior_k: np.ndarray,
    *,
    keep: int,
    documents: Sequence[Sequence[int]] | None = None,
    vocab: int = 0,
) -> Mixture:
    """Mixes the probabilities of several sources on the same texts.

    Args:
        parts: Probabilities of every source.
        prior_k: Weight of every source [K].
        keep: Likeliest tokens of the mixture that are kept per position.
        documents: Token ids of every document as it is scored; weights then follow the prediction of each document so
            far, from `prior_k` on. None: weights are `prior_k` everywhere.
        vocab: Size of the target's vocabulary, for weights by prediction.

    Returns:
        The mixture at every position that any source has, and the mean weights. With weights by prediction, positions
        where the sources that have them are below `LEAST_WEIGHT` are left out.
    """
    places = places_of(parts)
    if documents is None:
        weight_kn = np.where(places.row >= 0, prior_k[:, None], 0.0)
    else:
        weight_kn = predictive_weights(_log_likelihoods(parts, places, documents, vocab), places, prior_k)
        weight_kn = np.where(places.row >= 0, weight_kn, 0.0)
        kept = weight_kn.sum(axis=0) >= LEAST_WEIGHT
        places = Places(places.document[kept], places.position[kept], places.row[:, kept])
        weight_kn = weight_kn[:, kept]
    weight_kn = weight_kn / weight_kn.sum(axis=0)
    settled = []
    for part, row, weight in zip(parts, places.row, weight_kn, strict=True):
        about = np.flatnonzero(row >= 0)
        mass = weight[about, None] * part.weight[row[about]]
        listed = mass > 0
        whole = np.broadcast_to(about[:, None], mass.shape)
        settled.append((whole[listed], part.ids[row[about]][listed], mass[listed]))
    ids, weight = sum_by_token(settled, len(places.document), keep)
    return Mixture(TeacherProbabilities(places.document, places.position, ids, weight), weight_kn.mean(axis=1))


def source_seed(seed: int, number: int) -> int:
    """Returns the seed of the texts of a source: that of the run for the first, others so that prompts differ.

    Args:
        seed: Seed of the run.
        number: Number of the source, from 0.
    """
    return seed if number == 0 else int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)


def counts_of(total: int, shares_k: np.ndarray) -> list[int]:
    """Splits a number of texts by shares of sum 1: whole numbers of that sum, the largest remainders rounded up."""
    exact = total * shares_k
    counts = np.floor(exact).astype(int)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts.tolist()
