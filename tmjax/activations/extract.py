"""`extract_activations`: two models read the same texts, row by row."""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from tmjax.activations.capture import capture
from tmjax.activations.store import Activations
from tmjax.checkpoints.model import Model
from tmjax.files.atomic import atomic_directory
from tmjax.models.sites import SITES
from tmjax.text.documents import Texts
from tmjax.text.rows import Pooling, pair_rows
from tmjax.text.tokenizer import load_tokenizer


def extract_activations(
    target: Model,
    source: Model,
    texts: Texts,
    out: str | Path,
    *,
    pooling: Pooling = "span",
    max_tokens: int = 512,
    batch_tokens: int = 8192,
    sites: Sequence[str] | None = None,
    dtype: jnp.dtype = jnp.float32,
    overwrite: bool = False,
) -> tuple[Activations, Activations]:
    """Writes `out`/target and `out`/source and returns both: `[layer, row, unit]` float32 of its sites (or `sites`).

    Row i of both is the same piece of the same text. Raises InputError if the models share no piece, or `out` exists.
    """
    tokenizers = [load_tokenizer(model.directory, model.spec.vocab) for model in (target, source)]
    rows, documents = pair_rows(texts, tokenizers, pooling=pooling, max_tokens=max_tokens)
    found = []
    for name, model, read in zip(("target", "source"), (target, source), documents, strict=True):
        path = Path(out) / name
        wanted = model.spec.sites if sites is None else sites
        with atomic_directory(path, overwrite=overwrite) as partial:
            capture(model.spec, model.params, rows, read, partial, sites=wanted, batch_tokens=batch_tokens, dtype=dtype)
        found.append(Activations(path, rows, model.spec.layers, {s: model.spec.axis_size(SITES[s]) for s in wanted}))
    return found[0], found[1]
