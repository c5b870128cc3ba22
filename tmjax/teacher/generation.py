"""Texts that a model writes: sampled after the first words of given texts, without what another finds foreign."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from tmjax.errors import InputError
from tmjax.models.generate import LEAST_ROWS, GenerationOptions, cache_bytes, generate
from tmjax.models.sample import Sampling
from tmjax.models.spec import DecoderSpec
from tmjax.sharding.memory import share_mib
from tmjax.sharding.mesh import Layout
from tmjax.text.buckets import bucket_length
from tmjax.text.documents import Texts
from tmjax.text.tokenizer import TextTokenizer
from tmjax.typing import Params

#: Prompts are padded to multiples of this.
PROMPT_TOKENS = 16
#: The cache of a batch takes at most this part of an accelerator's memory, on a CPU so many MiB.
CACHE_SHARE, CACHE_CPU_MIB = 8, 1024


@dataclass(frozen=True)
class Writing:
    """How many texts, after 1 to `words` words of the given ones, of at most `tokens` new tokens each, drawn how."""

    texts: int
    words: int = 3
    tokens: int = 192
    temperature: float = 0.8
    top_p: float | None = None
    batch: int = 256

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(self.temperature, top_p=self.top_p)


def openings(texts: Sequence[str], how: Writing, seed: int) -> list[str]:
    """The first 1 to `how.words` words of texts drawn at random, one for every text to be written."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(texts), size=how.texts)
    words = rng.integers(1, how.words + 1, size=how.texts)
    return [" ".join(texts[i].split()[:n]) for i, n in zip(chosen, words, strict=True)]


def written_texts(
    spec: DecoderSpec,
    params: Params,
    tokenizer: TextTokenizer,
    given: Sequence[str],
    how: Writing,
    *,
    seed: int,
    dtype: jnp.dtype = jnp.float32,
    layout: Layout | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """`how.texts` texts, opening included, that begin as `given` do; the same for the same seed on any mesh.

    A text that does not end within `how.tokens` is cut there.
    """
    ids = [[tokenizer.prefix, *encoding.ids] for encoding in tokenizer.encode(openings(given, how, seed))]
    order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
    longest = len(ids[order[-1]]) + how.tokens
    room = share_mib(CACHE_SHARE, CACHE_CPU_MIB) * 2**20 // cache_bytes(spec, longest, dtype)
    size = min(how.batch, max(LEAST_ROWS, 2 ** (max(room, 1).bit_length() - 1)))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        options = GenerationOptions(
            how.tokens,
            ends=[tokenizer.suffix],
            known=tokenizer.known(spec.vocab),
            sampling=how.sampling,
            seed=seed,
            prompt_tokens=-(-len(ids[rows[-1]]) // PROMPT_TOKENS) * PROMPT_TOKENS,
            rows=min(size, bucket_length(len(rows))),
            dtype=dtype,
        )
        new = generate(spec, params, [ids[n] for n in rows], options, numbers=rows, layout=layout)
        for number, added in zip(rows, new, strict=True):
            ids[number] += added
        progress(start + len(rows), len(ids))
    return [tokenizer.decode(item[1:]).strip() for item in ids]


def familiar(bits_per_byte: np.ndarray, of_given: np.ndarray, *, most: float) -> np.ndarray:
    """Which texts a model finds no more foreign than `most` times the highest bits per byte of the given ones' middle.

    `bits_per_byte` are those of the written texts, `of_given` those of the texts they were to resemble, whose 95th
    percentile is meant: texts in another language are far above it.
    """
    return bits_per_byte <= most * np.quantile(of_given, 0.95)


def chosen_texts(name: str, texts: Sequence[str], kept: np.ndarray, *, required: bool = True) -> Texts:
    """The texts that are kept and not empty, each once, with ids `written:N`.

    Raises InputError if there is none, unless they are not `required`.
    """
    seen: dict[str, str] = {}
    for number, (text, keep) in enumerate(zip(texts, kept, strict=True)):
        if keep and text:
            seen.setdefault(text, f"written:{number}")
    if not seen and required:
        raise InputError(
            f"none of the {len(texts)} texts {name} is of use: {int(np.sum(~kept))} are foreign to the target, the "
            "others empty; raise written.foreign, or leave source-written texts out"
        )
    return Texts(name, tuple(seen.values()), tuple(seen))
