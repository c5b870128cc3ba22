"""Lexical transport: what the source's embeddings know of words goes into the embeddings of the target.

Every token of the target is written, as it stands within a text, by the source's tokenizer. The mean x of the source's
embeddings over these pieces is mapped to the target's space by a weighted ridge regression, fitted on the tokens that
are frequent in the calibration texts, each as often as it occurs (c times), means m and covariances so weighted:

    e^ = m_e + (x - m_x) (A + lambda tr(A) / k I)^-1 C,   A = cov(x, x) [k, k],  C = cov(x, e) [k, d].

The token's embedding becomes (1 - w) e + w e^ with w = alpha kappa / (kappa + c); tied embeddings are the output rows
too. Validation text chooses alpha and kappa, or that nothing changes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.errors import InputError
from tmjax.models.spec import DecoderSpec
from tmjax.recipes.merge import LexicalOptions
from tmjax.sharding.hosts import to_host
from tmjax.text.tokenizer import TextTokenizer
from tmjax.text.writing import write_within
from tmjax.typing import Array, ArrayLike, Params

#: Path of the table of embeddings.
EMBEDDINGS = "embed.weight"
#: Tokens whose pieces are gathered at a time.
_TOKENS = 4096


class Lexicon(NamedTuple):
    """The target's tokens as the source reads them.

    `ids` [n]: tokens that are text to both; `pieces`: the source's tokens of each; `counts` [n]: how often each occurs
    in the calibration texts. For controls, which of the n tokens' source embeddings each gets `before` the fit, and
    which one's mapped embedding `after` it; the token's own where None.
    """

    ids: np.ndarray
    pieces: tuple[tuple[int, ...], ...]
    counts: np.ndarray
    before: np.ndarray | None = None
    after: np.ndarray | None = None


@dataclass(frozen=True)
class Blended:
    """The parameters, what was chosen (None: no trial was better than no change) and what it came to.

    `losses`: validation bits per byte without and with it; `mapped` [V, embed] float32 is e^ (the target's own where a
    token is no text), `weight` [V] w as chosen.
    """

    params: Params
    chosen: dict[str, float] | None
    losses: tuple[float, float]
    trials: int
    mapped: np.ndarray
    weight: np.ndarray


def memory(target: DecoderSpec, source: DecoderSpec) -> int:
    """Bytes that blending holds beside the parameters: four tables like the target's, the source's and its means."""
    return 4 * (4 * target.vocab * target.hidden + (source.vocab + target.vocab) * source.hidden)


def read_lexicon(
    target: TextTokenizer, source: TextTokenizer, texts: Sequence[str], vocabularies: tuple[int, int]
) -> Lexicon:
    """The lexicon of two tokenizers, counted in texts; `vocabularies` are the rows of both models' embeddings.

    Raises InputError if no token of the target is text that the source reads.
    """
    own, theirs = vocabularies
    seen = np.zeros(own, np.int64)
    for encoding in target.encode(texts):
        np.add.at(seen, [i for i in encoding.ids if i < own], 1)
    # Tokens that are a part of a character are no text; second choices, as <0x41> is where A is a token, stand in none.
    plain = sorted((number, text) for text, number in target.vocabulary.written().items() if number < own)
    plain = [(number, text) for number, text in plain if _is_text(text)]
    written = write_within(source, [text for _, text in plain])
    kept = [(number, ids) for (number, _), ids in zip(plain, written, strict=True) if ids and max(ids) < theirs]
    if not kept:
        raise InputError("no token of the target is text that the source's tokenizer reads; set fusion.lexical: null")
    ids = np.array([number for number, _ in kept])
    return Lexicon(ids, tuple(pieces for _, pieces in kept), seen[ids].astype(np.float64))


def _is_text(text: bytes) -> bool:
    try:
        return "\N{REPLACEMENT CHARACTER}" not in text.decode()
    except UnicodeDecodeError:
        return False


def source_rows(lexicon: Lexicon, embeddings: np.ndarray) -> np.ndarray:
    """x [n, k] float32: the mean of the source's `embeddings` over every token's pieces."""
    found = np.empty((len(lexicon.ids), embeddings.shape[1]), np.float32)
    for first in range(0, len(found), _TOKENS):
        part = lexicon.pieces[first : first + _TOKENS]
        lengths = np.array([len(pieces) for pieces in part])
        rows = np.asarray(embeddings[np.concatenate(part)], np.float32)
        sums = np.add.reduceat(rows, np.cumsum(lengths) - lengths, axis=0)
        found[first : first + _TOKENS] = sums / lengths[:, None]
    return found if lexicon.before is None else found[lexicon.before]


def ridge_map(x: np.ndarray, y: np.ndarray, counts: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """The affine map x B + b of weighted least squares from x [n, k] to y [n, d], in float64.

    The penalty is in units of the mean variance of x. Returns B [k, d] and b [d].
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
    lexicon: Lexicon, own: np.ndarray, theirs: np.ndarray, options: LexicalOptions, *, zero_source: bool = False
) -> np.ndarray:
    """e^ [V, embed] float32 from the two models' embeddings: the target's `own` rows where a token is no text.

    With `zero_source` every token gets the mean of what is frequent. Raises InputError if too few tokens are.
    """
    frequent = lexicon.counts >= options.frequent
    if frequent.sum() < 2:
        raise InputError(
            f"no two tokens occur {options.frequent} times in the calibration texts; give more text, lower "
            "fusion.lexical.frequent or set fusion.lexical: null"
        )
    found = np.array(own, np.float32)
    # Tokens that are frequent are few, so what is fitted on is small, whatever the vocabulary.
    counts, held = lexicon.counts[frequent], found[lexicon.ids[frequent]]
    if zero_source:
        found[lexicon.ids] = counts @ held.astype(np.float64) / counts.sum()
        return found
    rows = source_rows(lexicon, theirs)
    weight, shift = ridge_map(rows[frequent], held, counts, options.ridge)
    mapped = rows @ weight.astype(np.float32) + shift.astype(np.float32)
    found[lexicon.ids] = mapped if lexicon.after is None else mapped[lexicon.after]
    return found


@jax.jit
def _blended(own: ArrayLike, mapped: ArrayLike, weight_v: ArrayLike) -> Array:
    own = jnp.asarray(own, jnp.float32)
    return own + weight_v[:, None] * (mapped - own)


def blend(
    params: Params,
    source: Params,
    lexicon: Lexicon,
    options: LexicalOptions,
    loss: Callable[[Params], float],
    *,
    screen: Callable[[Params], float] | None = None,
    zero_source: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Blended:
    """Blends the source's embeddings into `params` as `loss` (on validation text) is least; perhaps not at all.

    With a `screen`, a cheaper loss, trials are compared by that, and the best of them is held to `loss`. Every arm of a
    comparison makes the same trials. Raises InputError as `mapped_embeddings` does.
    """
    own = np.asarray(to_host(params[EMBEDDINGS]), np.float32)
    theirs = np.asarray(to_host(source[EMBEDDINGS]))
    mapped = mapped_embeddings(lexicon, own, theirs, options, zero_source=zero_source)

    def weights(alpha: float, kappa: float) -> np.ndarray:
        found = np.zeros(len(own), np.float32)
        found[lexicon.ids] = alpha * kappa / (kappa + lexicon.counts)
        return found

    tried = [{"alpha": alpha, "kappa": kappa} for alpha in options.alphas for kappa in options.kappas]
    before, best = loss(params), (np.inf, -1)
    for number, values in enumerate(tried):
        moved = {**params, EMBEDDINGS: _blended(params[EMBEDDINGS], mapped, weights(**values))}
        best = min(best, ((screen or loss)(moved), number))
        progress(number + 1, len(tried))
    after, number = best
    weight = weights(**tried[number])
    moved = {**params, EMBEDDINGS: _blended(params[EMBEDDINGS], mapped, weight)}
    after = after if screen is None else loss(moved)
    if after >= before:
        return Blended(params, None, (before, before), len(tried), mapped, np.zeros(len(own), np.float32))
    return Blended(moved, tried[number], (before, after), len(tried), mapped, weight)
