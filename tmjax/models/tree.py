"""Texts with branches in one forward pass: what a model says after tokens that are not in the text.

A row holds a text and, behind it, nodes; a node follows a token of the text or another node and sees what that one
sees, and itself. So many continuations of every prefix cost one token each.
"""

import jax.numpy as jnp
import numpy as np

from tmjax.models.decoder import bind
from tmjax.models.layers import attention
from tmjax.models.rotary import rotary_tables
from tmjax.models.spec import DecoderSpec
from tmjax.typing import Array, Params


def visible(parents_bn: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions [B, T] and which entry sees which [B, T, T], T = tokens + n, of rows of `tokens` and n nodes.

    `parents_bn` are the entries that the nodes follow: tokens, or nodes that stand before them in the row.
    """
    batch, nodes = parents_bn.shape
    size = tokens + nodes
    position = np.zeros((batch, size), np.int32)
    position[:, :tokens] = np.arange(tokens)
    seen = np.zeros((batch, size, size), bool)
    seen[:, :tokens, :tokens] = np.tri(tokens, dtype=bool)
    row = np.arange(batch)
    for node in range(nodes):
        entry, parent = tokens + node, parents_bn[:, node]
        seen[:, entry] = seen[row, parent]
        seen[:, entry, entry] = True
        position[:, entry] = position[row, parent] + 1
    return position, seen


def tree_hidden(
    spec: DecoderSpec, params: Params, ids_bt: Array, position_bt: Array, seen_btt: Array, dtype: jnp.dtype
) -> Array:
    """Final normed states [B, T, embed] of entries that see what `visible` says; for use inside jit.

    Those of a text alone, continued by a node's branch. Rotary frequencies that stretch with the length of a run
    (`dynamic`, `longrope`) are those of a run of T tokens.
    """
    tokens = ids_bt.shape[1]
    tables = rotary_tables(spec.rotaries, spec.head_dim, jnp.arange(tokens))
    distance = position_bt[:, :, None] - position_bt[:, None, :]

    def mask(window: Array) -> Array:
        return (seen_btt & (distance < window))[:, None, None]

    placed = tuple(table[:, position_bt] for table in tables)
    return bind(spec, params).run(ids_bt, position_bt, placed, mask, attention, dtype)[0]
