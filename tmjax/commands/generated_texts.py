"""A stage's work: texts that a model writes after the beginnings of given ones, as a file."""

import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from tmjax.checkpoints.model import Model
from tmjax.evaluate.bits import Scorer
from tmjax.runs.manifest import GeneratedFacts
from tmjax.sharding import hosts
from tmjax.sharding.mesh import Layout
from tmjax.teacher.generation import Writing, chosen_texts, familiar, written_texts
from tmjax.text.documents import Texts
from tmjax.text.tokenizer import load_tokenizer
from tmjax.typing import Params


def write_texts(
    partial: Path,
    writer: tuple[Model, Params],
    given: Texts,
    how: Writing,
    *,
    name: str,
    seed: int,
    dtype: jnp.dtype,
    layout: Layout,
    progress: Callable[[int, int], None],
    familiar_to: tuple[Callable[[Texts], Scorer], Params] | None = None,
    foreign: float | None = None,
    first: int | None = None,
    most_bytes: int | None = None,
    required: bool = True,
) -> GeneratedFacts:
    """Writes `.jsonl` of texts to `partial`; returns manifest facts.

    With `familiar_to` (what scores texts, and a model's parameters) and `foreign` texts in another language are left
    out; that none remains is an InputError, unless texts are not `required`. At most the `first` texts are kept, and as
    many as fit into `most_bytes` (one at least).
    """
    model, params = writer
    found = written_texts(
        model.spec,
        params,
        load_tokenizer(model.directory, model.spec.vocab),
        given.texts,
        how,
        seed=seed,
        dtype=dtype,
        layout=layout,
        progress=progress,
    )
    kept = np.ones(len(found), bool)
    if familiar_to is not None and foreign is not None:
        score, judge = familiar_to
        asked = Texts("written", tuple(map(str, range(len(found)))), tuple(text or " " for text in found))
        each = [(held.nll / np.log(2) / held.bytes) for held in (score(texts)(judge) for texts in (asked, given))]
        kept = familiar(each[0], each[1], most=foreign)
    texts = chosen_texts(f"written by {name}", found, kept, required=required).first(first)
    if most_bytes is not None:
        sizes = np.cumsum([len(text.encode()) for text in texts.texts])
        texts = texts.first(max(1, int(np.searchsorted(sizes, most_bytes, side="right"))))
    if hosts.is_first():
        with partial.open("w", encoding="utf-8") as stream:
            for number, text in zip(texts.ids, texts.texts, strict=True):
                stream.write(json.dumps({"id": number, "text": text}, ensure_ascii=False) + "\n")
    return GeneratedFacts(asked=len(found), foreign=int(np.sum(~kept)), kept=len(texts))
