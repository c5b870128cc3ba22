"""Texts that a model generates: sampled after the first words of given texts, then filtered by another model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import jax.numpy as jnp
import numpy as np

from tmjax.errors import InputError
from tmjax.models.generate import LEAST_ROWS, DecodingOptions, cache_bytes, generate
from tmjax.models.prompts import PROMPT_TOKENS
from tmjax.models.sample import Sampling
from tmjax.models.spec import DecoderSpec
from tmjax.recipes.objectives import GenerationOptions
from tmjax.sharding.memory import share_mib
from tmjax.teacher.lines import as_line, line_ends, require_lines
from tmjax.teacher.teacher_model import Teacher
from tmjax.text.buckets import bucket_length
from tmjax.text.documents import Texts

#: Texts in a row that have the same lines before them, which are read once.
SHARE_LINES = 16
#: The cache of a batch takes at most this part of an accelerator's memory, on a CPU so many MiB.
CACHE_SHARE, CACHE_CPU_MIB = 8, 1024


@dataclass(frozen=True)
class Generation:
    """Number of generated texts, and settings of their sampling.

    Attributes:
        texts: Number of texts.
        words: Prompts are the first 1 to `words` words of given texts.
        tokens: Most new tokens of a text.
        temperature: Temperature of sampling.
        top_p: Probability mass of nucleus sampling; None samples from the whole vocabulary.
        examples: Number of given texts that stand before every prompt, a line each, so that the model stays with
            their subject and form; a generated text then ends with its line.
        batch: Most texts that are generated together.
    """

    texts: int
    words: int = 3
    tokens: int = 192
    temperature: float = 0.8
    top_p: float | None = None
    examples: int = 0
    batch: int = 256

    @classmethod
    def of(cls, options: GenerationOptions, examples: int) -> Self:
        """Returns the settings of a recipe, with so many examples."""
        return cls(options.texts, options.words, options.tokens, options.temperature, options.top_p, examples)

    @property
    def sampling(self) -> Sampling:
        """Settings of the sampling of tokens."""
        return Sampling(self.temperature, top_p=self.top_p)


@dataclass(frozen=True)
class TextFilter:
    """Conditions under which generated texts are kept.

    Attributes:
        judge: Returns the bits per byte [N] of texts under the model that will learn from them; None keeps all texts.
        foreign: Texts with more bits per byte than this many times the 95th percentile of the given texts are left
            out, such as texts in another language; None keeps all texts.
        max_texts: Most texts that are kept.
        max_bytes: Most UTF-8 bytes of all kept texts together (at least one text is kept).
        without: The consequence of keeping no text, stated in a warning; None makes that an error.
    """

    judge: Callable[[Texts], np.ndarray] | None = None
    foreign: float | None = None
    max_texts: int | None = None
    max_bytes: int | None = None
    without: str | None = None


@dataclass(frozen=True)
class GeneratedTexts:
    """Generated texts, and whether the model has ended each of them; it was cut otherwise."""

    texts: Texts
    ended: tuple[bool, ...]

    def __len__(self) -> int:
        """Returns the number of texts."""
        return len(self.texts)


def openings(texts: Sequence[str], generation: Generation, seed: int) -> list[str]:
    """Draws a prompt for every text to be generated: the first 1 to `generation.words` words of a random text."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(texts), size=generation.texts)
    words = rng.integers(1, generation.words + 1, size=generation.texts)
    return [" ".join(texts[i].split()[:n]) for i, n in zip(chosen, words, strict=True)]


def contexts(texts: Sequence[str], generation: Generation, seed: int) -> list[str]:
    """Draws the lines before every prompt: `generation.examples` different given texts, or nothing.

    `SHARE_LINES` prompts in a row have the same ones.
    """
    count = min(generation.examples, len(texts))
    # A stream of its own: openings are those of a generation without examples.
    rng = np.random.default_rng([seed, 1])
    drawn = [rng.choice(len(texts), size=count, replace=False) for _ in range(0, generation.texts, SHARE_LINES)]
    lines = ["".join(f"{as_line(texts[i])}\n" for i in chosen) for chosen in drawn]
    return [lines[number // SHARE_LINES] for number in range(generation.texts)]


def batch_rows(spec: DecoderSpec, generation: Generation, tokens: int, dtype: jnp.dtype) -> int:
    """Returns the number of texts of `tokens` tokens that are generated together: as many as the cache has room for."""
    room = share_mib(CACHE_SHARE, CACHE_CPU_MIB) * 2**20 // cache_bytes(spec, tokens, dtype)
    return min(generation.batch, max(LEAST_ROWS, 2 ** (max(room, 1).bit_length() - 1)))


def generate_texts(
    teacher: Teacher,
    given: Sequence[str],
    generation: Generation,
    *,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[str], list[bool]]:
    """Samples texts that begin as given ones do; the same for the same seed on any mesh.

    Args:
        teacher: The model that generates.
        given: Texts whose first words are the prompts.
        generation: Number of texts and sampling.
        seed: Seed of prompts and samples.
        progress: Called with (texts done, all texts) after each batch.

    Returns:
        `generation.texts` texts, prompts included, and whether each has ended. A text that does not end within
        `generation.tokens` is cut there.

    Raises:
        InputError: There are examples, and the tokenizer drops line breaks.
    """
    spec, tokenizer = teacher.spec, teacher.tokenizer
    before = contexts(given, generation, seed)
    begun = [context + opening for context, opening in zip(before, openings(given, generation, seed), strict=True)]
    ids = [[tokenizer.prefix, *encoding.ids] for encoding in tokenizer.encode(begun)]
    ended, ends = [False] * len(ids), [tokenizer.suffix]
    lines = before[0].count("\n")
    if lines:
        require_lines(tokenizer)
        ends += line_ends(tokenizer)

    def finished(number: int, new: list[int]) -> bool:
        return lines > 0 and "\n" in tokenizer.decode(new)

    groups = [number // SHARE_LINES for number in range(len(ids))] if lines else None
    order = sorted(range(len(ids)), key=lambda n: (groups[n] if groups else 0, len(ids[n])))
    longest = max(map(len, ids)) + generation.tokens
    size = batch_rows(spec, generation, longest, teacher.dtype)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        options = DecodingOptions(
            generation.tokens,
            ends=ends,
            known=tokenizer.known(spec.vocab),
            sampling=generation.sampling,
            seed=seed,
            prompt_tokens=PROMPT_TOKENS,
            rows=min(size, bucket_length(len(rows))),
            dtype=teacher.dtype,
        )
        prompts = [ids[n] for n in rows]
        new = generate(
            spec,
            teacher.params,
            prompts,
            options,
            numbers=rows,
            groups=[groups[n] for n in rows] if groups else None,
            layout=teacher.layout,
            finished=finished,
        )
        for number, added in zip(rows, new, strict=True):
            ids[number] += added
            ended[number] = len(added) < generation.tokens or finished(number, added)
        progress(start + len(rows), len(ids))
    written = [tokenizer.decode(item[1:]) for item in ids]
    return [(text.split("\n")[lines] if lines else text).strip() for text in written], ended


def familiar(bits_per_byte: np.ndarray, of_given: np.ndarray, *, maximum: float) -> np.ndarray:
    """Compares generated texts with given ones by their bits per byte under one model.

    Args:
        bits_per_byte: Those of the generated texts [N].
        of_given: Those of the given texts [D].
        maximum: Largest ratio to the 95th percentile of the given texts; texts in another language are far above it.

    Returns:
        Whether each generated text is within that ratio, bool [N].
    """
    return bits_per_byte <= maximum * np.quantile(of_given, 0.95)


def chosen_texts(name: str, texts: Sequence[str], kept: np.ndarray, *, required: bool = True) -> Texts:
    """Returns the kept texts that are not empty, each once, with ids `generated:N`.

    Args:
        name: The name of the result, also in the error.
        texts: All texts.
        kept: Whether each text is familiar to the model that will learn from it, bool [N].
        required: Whether a result without a text is an error.

    Raises:
        InputError: No text is left, though texts are `required`.
    """
    seen: dict[str, str] = {}
    for number, (text, keep) in enumerate(zip(texts, kept, strict=True)):
        if keep and text:
            seen.setdefault(text, f"generated:{number}")
    if not seen and required:
        raise InputError(
            f"none of the {len(texts)} texts {name} is of use: {int(np.sum(~kept))} are foreign to the target, the "
            "others empty; raise generation.foreign, or leave generated texts out"
        )
    return Texts(name, tuple(seen.values()), tuple(seen))


def filter_texts(
    name: str, texts: Sequence[str], ended: Sequence[bool], given: Texts, settings: TextFilter
) -> tuple[GeneratedTexts, dict[str, int]]:
    """Leaves out foreign, empty and repeated texts, and those beyond the limits.

    Args:
        name: Who generated the texts.
        texts: The generated texts.
        ended: Whether each has ended.
        given: The texts that they should resemble.
        settings: What is kept.

    Returns:
        The kept texts, and counts: `asked`, `foreign`, `kept`, `cut` (kept ones that have not ended).

    Raises:
        InputError: No text is left and `settings.without` is None.
    """
    kept = np.ones(len(texts), bool)
    if settings.judge is not None and settings.foreign is not None:
        # A text without a byte has no bits per byte.
        scored = Texts("generated", tuple(map(str, range(len(texts)))), tuple(text or " " for text in texts))
        kept = familiar(settings.judge(scored), settings.judge(given), maximum=settings.foreign)
    chosen = chosen_texts(f"generated by {name}", texts, kept, required=settings.without is None)
    chosen = chosen.first(settings.max_texts)
    if settings.max_bytes is not None:
        sizes = np.cumsum([len(text.encode()) for text in chosen.texts])
        chosen = chosen.first(max(1, int(np.searchsorted(sizes, settings.max_bytes, side="right"))))
    # The first of several equal texts is the one that is kept.
    has_ended = dict(zip(reversed(texts), reversed(ended), strict=True))
    result = GeneratedTexts(chosen, tuple(has_ended[text] for text in chosen.texts))
    facts = {"asked": len(texts), "foreign": int(np.sum(~kept)), "kept": len(chosen)}
    return result, facts | {"cut": len(chosen) - sum(result.ended)}
