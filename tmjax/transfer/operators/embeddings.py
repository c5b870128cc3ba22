"""Blended embeddings: the source's embeddings, mapped through the texts of tokens, enter those of the target.

Every token of the target is written, as it stands within a text, by the source's tokenizer. The mean x of the source's
embeddings over these pieces is mapped to the target's space by a weighted ridge regression, fitted on the tokens that
are frequent in the calibration texts, each as often as it occurs (c times), means m and covariances so weighted:

    e^ = m_e + (x - m_x) (A + lambda tr(A) / k I)^-1 C,   A = cov(x, x) [k, k],  C = cov(x, e) [k, d].

The token's embedding becomes (1 - w) e + w e^ with w = alpha kappa / (kappa + c); tied embeddings are the output rows
too. Validation text chooses alpha and kappa, or that nothing changes.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from tmjax.checkpoints.model import Model
from tmjax.errors import InputError
from tmjax.recipes.base import Positive, PositiveFloat, Section
from tmjax.sharding.hosts import to_host
from tmjax.text.token_map import TokenMap
from tmjax.transfer.contribution import Applied, Context, Shape
from tmjax.transfer.source_view import SourceView
from tmjax.transfer.update_table import Table
from tmjax.typing import Array, ArrayLike, Params

#: Path of the table of embeddings.
EMBEDDINGS = "embed.weight"


class EmbeddingOptions(Section):
    """Options of the operator `embeddings`: a token that occurs c times moves by alpha kappa / (kappa + c)."""

    alphas: Annotated[
        tuple[PositiveFloat, ...], Field(min_length=1, description="Alphas tried on the validation texts.")
    ] = (0.1, 0.3, 0.6, 1.0)
    kappas: Annotated[
        tuple[PositiveFloat, ...], Field(min_length=1, description="Kappas tried on the validation texts.")
    ] = (3.0, 30.0, 300.0, 3000.0)
    frequent: Annotated[
        Positive, Field(description="The map is fitted on tokens that occur so often in the calibration texts.")
    ] = 3
    ridge: Annotated[
        PositiveFloat, Field(description="Penalty of the map, in units of the source embeddings' mean variance.")
    ] = 0.1


@dataclass(frozen=True)
class Blended:
    """The parameters, the chosen trial (None: none was better than no change) and its validation scores.

    `losses`: validation bits per byte without and with it; `mapped` [V, embed] float32 is e^ (the target's own where a
    token is no text), `weight` [V] w as chosen.
    """

    params: Params
    chosen: dict[str, float] | None
    losses: tuple[float, float]
    trials: int
    mapped: np.ndarray
    weight: np.ndarray


def ridge_map(x: np.ndarray, y: np.ndarray, counts: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Fits the affine map x B + b by weighted ridge regression, in float64.

    Args:
        x: Inputs [n, k].
        y: Goals [n, d].
        counts: Weights of the rows [n].
        ridge: Penalty of B, in units of the mean variance of x.

    Returns:
        B [k, d] and b [d].
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    share = counts / counts.sum()
    mean_x, mean_y = share @ x, share @ y
    x, y = x - mean_x, y - mean_y
    left = (x * share[:, None]).T
    gram = left @ x
    size = max(np.trace(gram) / len(gram), 1e-30)
    solved = np.linalg.solve(gram + ridge * size * np.eye(len(gram)), left @ y)
    return solved, mean_y - mean_x @ solved


def mapped_embeddings(
    token_map: TokenMap, target_ve: np.ndarray, source_vk: np.ndarray, options: EmbeddingOptions
) -> np.ndarray:
    """Maps the source's embeddings to the target's space.

    Args:
        token_map: The target's tokens in the source's vocabulary.
        target_ve: Embeddings of the target.
        source_vk: Embeddings of the source.
        options: Threshold of frequent tokens and penalty.

    Returns:
        e^ [V, embed] float32; the target's own rows where a token is no text.

    Raises:
        InputError: Too few tokens are frequent.
    """
    frequent = token_map.counts >= options.frequent
    if frequent.sum() < 2:
        raise InputError(
            f"no two tokens occur {options.frequent} times in the calibration texts; give more text, lower "
            "embeddings.frequent or leave out the operator embeddings"
        )
    result = np.array(target_ve, np.float32)
    # Tokens that are frequent are few, so what is fitted on is small, whatever the vocabulary.
    goal = result[token_map.ids[frequent]]
    rows = token_map.mean_rows(source_vk)
    weight, shift = ridge_map(rows[frequent], goal, token_map.counts[frequent], options.ridge)
    mapped = rows @ weight.astype(np.float32) + shift.astype(np.float32)
    result[token_map.ids] = mapped if token_map.order is None else mapped[token_map.order]
    return result


@jax.jit
def _blended(own: ArrayLike, mapped: ArrayLike, weight_v: ArrayLike) -> Array:
    own = jnp.asarray(own, jnp.float32)
    return own + weight_v[:, None] * (mapped - own)


def _beside(table: ArrayLike, mapped: np.ndarray) -> Array:
    """Puts the mapped table on the devices as the target's lies there: once, not in every trial."""
    if isinstance(table, jax.Array):
        return jax.make_array_from_callback(mapped.shape, table.sharding, lambda index: mapped[index])
    return jnp.asarray(mapped)


def blend(
    params: Params,
    source_vk: np.ndarray,
    token_map: TokenMap,
    options: EmbeddingOptions,
    loss: Callable[[Params], float],
    *,
    screen: Callable[[Params], float] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Blended:
    """Blends the source's embeddings into parameters by the trial with the smallest loss, or by none.

    Args:
        params: Parameters of the target.
        source_vk: Embeddings of the source.
        token_map: The target's tokens in the source's vocabulary.
        options: Alphas and kappas to try, and the fit of the map.
        loss: Bits per byte of parameters on validation text.
        screen: A cheaper loss, by which trials are compared; the best of them is held to `loss`.
        progress: Called with trials done and trials in all.

    Returns:
        The result; every arm of a comparison makes the same trials.

    Raises:
        InputError: Too few tokens are frequent.
    """
    own = np.asarray(to_host(params[EMBEDDINGS]), np.float32)
    mapped = mapped_embeddings(token_map, own, source_vk, options)
    placed = _beside(params[EMBEDDINGS], mapped)

    def weights(alpha: float, kappa: float) -> np.ndarray:
        result = np.zeros(len(own), np.float32)
        result[token_map.ids] = alpha * kappa / (kappa + token_map.counts)
        return result

    tried = [{"alpha": alpha, "kappa": kappa} for alpha in options.alphas for kappa in options.kappas]
    before, best = loss(params), (np.inf, -1)
    for number, values in enumerate(tried):
        moved = {**params, EMBEDDINGS: _blended(params[EMBEDDINGS], placed, weights(**values))}
        best = min(best, ((screen or loss)(moved), number))
        progress(number + 1, len(tried))
    after, number = best
    weight = weights(**tried[number])
    moved = {**params, EMBEDDINGS: _blended(params[EMBEDDINGS], placed, weight)}
    after = after if screen is None else loss(moved)
    if after >= before:
        return Blended(params, None, (before, before), len(tried), mapped, np.zeros(len(own), np.float32))
    return Blended(moved, tried[number], (before, after), len(tried), mapped, weight)


def blended_rows(target: Model, blended: Blended, contribution: float = 1.0) -> Table:
    """Makes the row of the update table for the embeddings, (1 - w) e + w e^.

    Args:
        target: The target before the first operator.
        blended: The blended embeddings.
        contribution: Factor on the source's contribution.

    Returns:
        Columns by the tensor's Hugging Face name: `alpha` is the mean of w over tokens, `beta` minus it, `source_part`
        ||w e^|| over the target's norm.
    """
    name = next(row.names(target.spec)[0] for row in target.rows if row.path == EMBEDDINGS)
    arrays = (target.params[EMBEDDINGS], blended.params[EMBEDDINGS])
    own, now = (np.asarray(to_host(x), np.float64) for x in arrays)
    size = max(float(np.linalg.norm(own)), 1e-30)
    mapped = blended.mapped.astype(np.float64)
    transported, part = float(np.linalg.norm(mapped)), float(np.linalg.norm(blended.weight[:, None] * mapped))
    return {
        name: {
            "transported_to_target_norm": contribution * transported / size,
            "raw_transported_to_target_norm": contribution * transported / size,
            "effective_update": float(np.linalg.norm(now - own)) / size,
            "cosine": float((own * mapped).sum()) / (size * max(transported, 1e-30)),
            "source_part": contribution * part / size,
            "dropped_mean": 0.0,
            "alpha": float(blended.weight.mean()),
            "beta": -float(blended.weight.mean()),
        }
    }


class Embeddings:
    """The source's embeddings, mapped through the texts of tokens and blended into the target's."""

    name: ClassVar[str] = "embeddings"
    options: ClassVar[type[Section]] = EmbeddingOptions
    needs: ClassVar[frozenset[str]] = frozenset({"token_map"})
    chooses: ClassVar[bool] = True

    def apply(self, params: Params, source: SourceView, options: EmbeddingOptions, context: Context) -> Applied:
        """Blends embeddings as validation text chooses; see `Operator.apply`."""
        assert context.loss is not None
        theirs = np.asarray(to_host(source.model.params[EMBEDDINGS]))
        if source.contribution != 1:
            theirs = theirs.astype(np.float32) * source.contribution
        blended = blend(
            params,
            theirs,
            source.token_map(),
            options,
            context.loss,
            screen=context.screen,
            progress=context.progress,
        )
        facts = {
            "chosen": blended.chosen,
            "valid_bits_per_byte": list(blended.losses),
            "trials": blended.trials,
        }
        rows = functools.partial(blended_rows, context.target, blended, source.contribution)
        return Applied(blended.params, facts, lambda final: rows())

    def memory(self, target: Shape, source: Shape, options: EmbeddingOptions, batch_tokens: int) -> int:
        """Estimates four tables like the target's, the source's and its means."""
        own, theirs = target.spec, source.spec
        return 4 * (4 * own.vocab * own.hidden + (theirs.vocab + own.vocab) * theirs.hidden)


OPERATOR = Embeddings()
