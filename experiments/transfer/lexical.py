"""Lexical transport: what the source's embeddings know of words goes into the rare tokens of the target.

Every target token is written as text and read by the source's tokenizer; the mean of the source's embeddings over its
tokens is mapped to the target's space by a ridge regression fitted on tokens that are frequent in the calibration
texts, each weighted by its count c. A token's embedding (and, if tied, its output row) becomes (1 - w) e + w e^ with
w = alpha kappa / (kappa + c): what is rare in the texts is trusted to the source, what is frequent stays.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from trials import Fused, compare

from tmjax.evaluate.bits import Scores
from tmjax.hub.texts import Texts
from tmjax.hub.tokenizer import TextTokenizer
from tmjax.pipeline.inputs import Inputs
from tmjax.recipe import Recipe
from tmjax.typing import Params

ALPHAS = (0.1, 0.3, 0.6, 1.0)
KAPPAS = (3.0, 30.0, 300.0, 3000.0)
FREQUENT = 3
ARMS = ("merged", "control:shrink", "control:random_source", "control:shuffled_rows")


def counts_of(tokenizer: TextTokenizer, texts: Texts, vocab: int) -> np.ndarray:
    """How often every token occurs in the texts [V]."""
    ids = [i for encoding in tokenizer.encode(texts.texts) for i in encoding.ids]
    return np.bincount(ids, minlength=vocab).astype(np.float64)


def source_rows(target: TextTokenizer, source: TextTokenizer, embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the target's tokens that are text, and the mean source embedding of each."""
    plain = [i for i in range(len(target.fast)) if i not in target.special_ids]
    surface = [target.fast.decode([i]) for i in plain]
    read = source.encode(surface)
    kept = [n for n, (text, e) in enumerate(zip(surface, read, strict=True)) if e.ids and "\ufffd" not in text]
    return np.array([plain[n] for n in kept]), np.stack([embeddings[read[n].ids].mean(axis=0) for n in kept])


def ridge_map(x_nk: np.ndarray, y_nd: np.ndarray, weight_n: np.ndarray, ridge: float = 0.1) -> Callable:
    """The affine map that predicts y from x, weighted least squares; the penalty is relative to the mean variance."""
    share = weight_n / weight_n.sum()
    mean_x, mean_y = share @ x_nk, share @ y_nd
    x, y = x_nk - mean_x, y_nd - mean_y
    gram = (x * share[:, None]).T @ x
    solved = np.linalg.solve(gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram)), (x * share[:, None]).T @ y)
    return lambda z: mean_y + (z - mean_x) @ solved


def predictions(arm: str, rows: np.ndarray, own: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """What an arm would put in place of the embeddings `own` [n, d]; `rows` [n, k] are the source's."""
    rng = np.random.default_rng(seed)
    if arm == "control:random_source":
        rows = rng.normal(size=rows.shape) * rows.std()
    if arm == "control:shuffled_rows":
        rows = rows[rng.permutation(len(rows))]
    if arm == "control:shrink":
        return np.broadcast_to((counts[:, None] * own).sum(axis=0) / counts.sum(), own.shape)
    frequent = counts >= FREQUENT
    return ridge_map(rows[frequent], own[frequent], counts[frequent])(rows)


def run(recipe: Recipe, progress: Callable[[str], None]) -> tuple[dict[str, Scores], dict[str, Any]]:
    """All arms with the same trials on `valid`, measured once on `test`: scores, and what was chosen, by arm."""
    inputs = Inputs(recipe)
    target, source = inputs.target, inputs.source
    own_all = np.asarray(target.params["embed.weight"], np.float64)
    theirs = np.asarray(source.params["embed.weight"], np.float64)
    ids, rows = source_rows(inputs.target_tokenizer, inputs.source_tokenizer, theirs)
    counts, own = counts_of(inputs.target_tokenizer, inputs.texts, target.spec.vocab)[ids], own_all[ids]

    def arm(name: str) -> Fused:
        predicted = predictions(name, rows, own, counts, recipe.seed)

        def fused(alpha: float, kappa: float) -> Params:
            weight = (alpha * kappa / (kappa + counts))[:, None]
            table = own_all.copy()
            table[ids] = (1 - weight) * own + weight * predicted
            return {**target.params, "embed.weight": table.astype(np.float32)}

        return fused

    tried = [{"alpha": alpha, "kappa": kappa} for alpha in ALPHAS for kappa in KAPPAS]
    return compare(inputs, {name: functools.partial(arm, name) for name in ARMS}, tried, progress)
