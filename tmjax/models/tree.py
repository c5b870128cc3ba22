"""Texts with branches: what a model says after tokens that are not in the text, from a cache of the text.

A text is read once and its keys and values are kept. A node then costs one token: it follows the first tokens of a text
and a few other nodes, and sees just these and itself. Nodes of all texts are read together, some to a row; a text with
many nodes has several rows.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from tmjax.models.blocks.primitives import einsum
from tmjax.models.cache import empty_cache, read_after
from tmjax.models.decoder import After, Carried, ForwardPlan, TokenContext, bind
from tmjax.models.layers import Attend, Sight, Weighing
from tmjax.models.rotary import rotary_tables
from tmjax.models.spec import DecoderSpec
from tmjax.sharding.mesh import constrain
from tmjax.typing import Array, ArrayLike, Params


class Nodes(NamedTuple):
    """Nodes in rows: `ids` [R, Q], and what each follows.

    `text` [R] is the text of a row's nodes, `prefix` [R, Q] how many of its first tokens a node follows, `count` [R, Q]
    how many other nodes after these, whose keys and values are the first of `keys` and `values` [R, layer, Q, A,
    kv head, head_dim].
    """

    ids: ArrayLike
    text: ArrayLike
    prefix: ArrayLike
    count: ArrayLike
    keys: ArrayLike
    values: ArrayLike


def _tables(spec: DecoderSpec, run: int) -> tuple[Array, Array]:
    return rotary_tables(spec.rotaries, spec.head_dim, jnp.arange(run))


def read_texts(
    spec: DecoderSpec,
    params: Params,
    ids_bt: Array,
    length_b: Array,
    branches: int,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
) -> tuple[Array, Array, Array]:
    """Final normed states [B, T, embed] of right-padded texts; their keys and values [layer, B, kv head, T, head_dim].

    For use inside jit. `branches` is the largest number of nodes after a text: rotary frequencies that stretch with the
    length of a run (`dynamic`, `longrope`) are those of a run of T + `branches` tokens.
    """
    batch, tokens = ids_bt.shape
    tables = tuple(table[:, None, :tokens] for table in _tables(spec, tokens + branches))
    hidden, cache = read_after(spec, params, empty_cache(spec, batch, 0, dtype), ids_bt, length_b, tables, mesh)
    return hidden, cache.keys, cache.values


def read_nodes(
    spec: DecoderSpec,
    params: Params,
    keys: Array,
    values: Array,
    nodes: Nodes,
    mesh: Mesh | None = None,
) -> tuple[Array, Array, Array]:
    """Final normed states [R, Q, embed] of nodes; their keys and values [layer, R, Q, kv head, head_dim].

    `keys` and `values` are those of the texts; for use inside jit. A state is that of a text which ends in its node.
    """
    position = nodes.prefix + nodes.count
    slots, others = keys.shape[3], nodes.keys.shape[3]
    tables = tuple(table[:, position] for table in _tables(spec, slots + others + 1))

    # Slots of the text, other nodes, the node itself.
    slot, other = jnp.arange(slots), jnp.arange(others)
    itself = jnp.ones((*position.shape, 1), bool)
    known = jnp.concatenate([slot < nodes.prefix[..., None], other < nodes.count[..., None], itself], axis=-1)
    before = position[..., None] - slot, nodes.count[..., None] - other, jnp.zeros(itself.shape, jnp.int32)
    distance = jnp.concatenate(before, axis=-1)

    def mask(window: Array) -> Sight:
        seen = known & (distance < window)
        return Sight(seen[:, None, None], distance[:, None, None], position[:, None, None])

    def enter(carried: Carried, layer: Array) -> tuple[Attend, After]:
        after = [carried]

        def attend(q: Array, k: Array, v: Array, sight: Sight, weighing: Weighing) -> Array:
            after[:] = [tuple(x.at[layer].set(new) for x, new in zip(carried, (k, v), strict=True))]
            rows, count, heads, dim = q.shape
            grouped = q.reshape(rows, count, k.shape[2], -1, dim)
            text = keys[layer][nodes.text], values[layer][nodes.text]
            other = nodes.keys[:, layer], nodes.values[:, layer]
            products = jnp.concatenate(
                [
                    einsum("rqkgd,rksd->rkgqs", grouped, text[0]),
                    einsum("rqkgd,rqakd->rkgqa", grouped, other[0]),
                    einsum("rqkgd,rqkd->rkgq", grouped, k)[..., None],
                ],
                axis=-1,
            )
            weights = weighing.weights(products, sight).astype(q.dtype)
            mixed = (
                einsum("rkgqs,rksd->rqkgd", weights[..., :slots], text[1])
                + einsum("rkgqa,rqakd->rqkgd", weights[..., slots:-1], other[1])
                + einsum("rkgq,rqkd->rqkgd", weights[..., -1], v)
            )
            return mixed.reshape(rows, count, heads * dim)

        return attend, lambda: after[0]

    fresh = jnp.zeros((spec.layers, *nodes.ids.shape, spec.kv_heads, spec.head_dim), keys.dtype)
    carried = tuple(constrain(mesh, x, (None, "batch", None, None, None)) for x in (fresh, fresh))
    model = bind(spec, params)
    context = TokenContext(position, tables, mask, enter, carried)
    hidden, _, made = model.run(nodes.ids, ForwardPlan(keys.dtype, mesh=mesh), context)
    return hidden, *made
