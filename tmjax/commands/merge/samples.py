"""Texts that target and merged model generate after the same beginnings, for the report."""

from collections.abc import Mapping

from tmjax.checkpoints.model import Model
from tmjax.models.generate import DecodingOptions, generate
from tmjax.models.sample import Sampling
from tmjax.sharding.mesh import Layout
from tmjax.text.documents import Texts
from tmjax.text.tokenizer import load_tokenizer

PROMPTS = 4
#: Largest number of words of a beginning, which is the first third of a text.
MOST_WORDS = 8
NEW_TOKENS = 48
TEMPERATURE = 0.7


def beginnings(texts: Texts) -> list[str]:
    """Returns the first words of texts that are spread over the file."""
    step = max(1, len(texts.texts) // PROMPTS)
    words = [text.split() for text in texts.texts[::step][:PROMPTS]]
    return [" ".join(part[: min(MOST_WORDS, max(1, len(part) // 3))]) for part in words if part]


def continued(model: Model, prompts: list[str], seed: int, layout: Layout | None = None) -> list[str]:
    """Generates a continuation of each prompt, sampled at `TEMPERATURE`, without special tokens."""
    tokenizer = load_tokenizer(model.directory, model.spec.vocab)
    ids = [[tokenizer.prefix, *encoding.ids] for encoding in tokenizer.encode(prompts)]
    room = max(1, min(NEW_TOKENS, model.spec.max_positions - max(map(len, ids))))
    options = DecodingOptions(room, (tokenizer.suffix,), tokenizer.known(model.spec.vocab), Sampling(TEMPERATURE), seed)
    generated = generate(model.spec, model.params, ids, options, layout=layout)
    return [tokenizer.decode(some) for some in generated]


def sample_texts(
    models: Mapping[str, Model], texts: Texts, seed: int, layout: Layout | None = None
) -> list[dict[str, str]]:
    """Returns one entry per beginning: its `prompt`, and its continuation by the name of each model."""
    prompts = beginnings(texts)
    entries = [{"prompt": prompt} for prompt in prompts]
    for name, model in models.items():
        for entry, text in zip(entries, continued(model, prompts, seed, layout), strict=True):
            entry[name] = text
    return entries
