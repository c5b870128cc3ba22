"""Many texts in one forward pass without padding: tokens that follow the same tokens are computed once.

Everything but attention is done for single tokens, whatever texts they belong to, so texts lie end to end in one row of
`nodes`: (token, tokens before it), each once even where several texts begin alike. Only attention sees texts, in a few
lengths: queries, keys and values are taken from the nodes into [text, T], and back.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from tmjax.models.decoder import Decoder, ForwardPlan, TokenContext, stateless
from tmjax.models.layers import Sight, Weighing, attention
from tmjax.typing import Array, ArrayLike, pytree_dataclass


@pytree_dataclass
@dataclass(frozen=True)
class Packed:
    """Texts as nodes [N] and, for each of a few lengths T, texts [B, T] of node numbers; padding is any node.

    `ids`, `positions` [N]; `cos`, `sin` [rotary, N, planes]. `texts` and `labels` hold a [B, T] for each length: nodes,
    and the token that follows (-1 where there is none to be scored). `asking` holds a [B, Q] for each: nodes of a text
    whose attention is computed there (all, or only its end where another text begins alike), and `first` [B] the place
    in the text where they begin. `back` [N]: where in the asking nodes of all lengths, laid end to end, a node stands.
    """

    ids: ArrayLike
    positions: ArrayLike
    cos: ArrayLike
    sin: ArrayLike
    back: ArrayLike
    texts: tuple[ArrayLike, ...]
    labels: tuple[ArrayLike, ...]
    asking: tuple[ArrayLike, ...]
    first: tuple[ArrayLike, ...]


def packed_hidden(model: Decoder, packed: Packed, dtype: jnp.dtype) -> Array:
    """Final normed states [N, embed] of all nodes: those of `Decoder.run` on each text alone."""

    def attend(q: Array, k: Array, v: Array, window: Array, weighing: Weighing) -> Array:
        mixed = []
        for text_bt, asking_bq, first_b in zip(packed.texts, packed.asking, packed.first, strict=True):
            place = first_b[:, None] + jnp.arange(asking_bq.shape[1])
            distance = place[:, :, None] - jnp.arange(text_bt.shape[1])
            sight = Sight.within(window, distance[:, None, None], place[:, None, None])
            mixed.append(attention(q[0][asking_bq], k[0][text_bt], v[0][text_bt], sight, weighing))
        flat = [x.reshape(-1, x.shape[-1]) for x in mixed]
        return jnp.concatenate(flat)[packed.back][None]

    context = TokenContext(packed.positions, (packed.cos, packed.sin), lambda window: window, stateless(attend))
    return model.run(packed.ids[None], ForwardPlan(dtype), context).hidden[0]
