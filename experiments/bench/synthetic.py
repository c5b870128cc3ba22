"""Models of random weights, made where they stay, and texts of random ids: for measurements that need only sizes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.checkpoints.model import Model
from tmjax.errors import InputError
from tmjax.models.families import FAMILIES
from tmjax.models.spec import DecoderSpec, Rotary
from tmjax.sharding.mesh import Layout
from tmjax.text.rows import Rows, TokenisedDocument

FAMILY = FAMILIES["llama"]
_LLAMA3 = Rotary(
    theta=500000.0, scaling="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8192
)
#: layers, hidden, mlp, heads, key-value heads, head_dim, vocabulary
SHAPES = {
    "llama-3.2-1b": (16, 2048, 8192, 32, 8, 64, 128256),
    "llama-3.1-8b": (32, 4096, 14336, 32, 8, 128, 128256),
    "tiny-target": (2, 64, 128, 4, 4, 16, 256),
    "tiny-source": (3, 96, 160, 4, 4, 24, 256),
}
#: Shapes whose head is the embedding.
TIED = frozenset({"llama-3.2-1b"})
STD = 0.02


def shape_of(text: str) -> DecoderSpec:
    """A Llama's spec from a name in SHAPES or from its sizes; raises InputError for anything else."""
    order = "layers,hidden,mlp,heads,kv_heads,head_dim,vocab"
    try:
        numbers = SHAPES.get(text) or tuple(int(part) for part in text.split(","))
        layers, hidden, mlp, heads, kv_heads, head_dim, vocab = numbers
    except ValueError:
        raise InputError(f"shape {text!r} is none of {', '.join(SHAPES)} and not {order}") from None
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": text in TIED,
    }
    return FAMILY.spec(config | FAMILY.write(DecoderSpec(*(1,) * 8, rotary=_LLAMA3)))


def random_model(spec: DecoderSpec, seed: int, layout: Layout, directory: Path) -> Model:
    """A model whose matrices are N(0, STD), norms 1, in bfloat16; `directory` is where its companion files would be.

    Every array is made on the devices that hold it.
    """
    rows = [row for row in FAMILY.params(spec) if row.tied_to is None]

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(STD)

    def make(key: jax.Array) -> dict[str, jax.Array]:
        made = {}
        for row, own in zip(rows, jax.random.split(key, len(rows)), strict=True):
            shape = row.stacked_shape(spec)
            if len(row.axes) == 1:
                made[row.path] = jnp.ones(shape, jnp.bfloat16)
            elif row.stacked:
                # Layer by layer, so that random bits of one layer at a time are in memory.
                keys = jax.random.split(own, shape[0])
                made[row.path] = jax.lax.map(lambda k, shape=shape: draw(k, shape[1:]), keys)
            else:
                made[row.path] = draw(own, shape)
        return made

    places = {row.path: layout.place(row, row.stacked_shape(spec)) for row in rows}
    # This generator is made by the device's own instruction where it has one, and compiles quickly.
    key = jax.random.key(seed, impl="unsafe_rbg")
    params = jax.block_until_ready(jax.jit(make, out_shardings=places)(key))
    directory.mkdir(parents=True, exist_ok=True)
    return Model(FAMILY, spec, params, FAMILY.config(spec) | {"dtype": "bfloat16"}, directory)


def random_texts(count: int, tokens: int, rows: int, vocab: int, seed: int) -> tuple[Rows, list[TokenisedDocument]]:
    """`count` texts of `tokens` random ids; each has `rows` pieces that together cover all but the first token."""
    generator = np.random.default_rng(seed)
    pieces = [piece.tolist() for piece in np.array_split(np.arange(1, tokens), rows)]
    documents = [TokenisedDocument(ids.tolist(), pieces) for ids in generator.integers(0, vocab, (count, tokens))]
    document = np.repeat(np.arange(count, dtype=np.int32), rows)
    ends = (np.tile([piece[at] for piece in pieces], count).astype(np.int32) for at in (0, -1))
    return Rows(f"random ids, seed {seed}", "sequence" if rows == 1 else "span", document, *ends), documents
