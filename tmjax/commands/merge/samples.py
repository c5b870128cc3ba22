"""What target and merged model write after the same beginnings: for the report."""

from collections.abc import Mapping

from tmjax.checkpoints.model import Model
from tmjax.models.generate import DecodingOptions, generate
from tmjax.models.sample import Sampling
from tmjax.sharding.mesh import Layout
from tmjax.text.documents import Texts
from tmjax.text.tokenizer import load_tokenizer

PROMPTS = 4
#: Of a text's words its first third, but at most so many.
MOST_WORDS = 8
NEW_TOKENS = 48
TEMPERATURE = 0.7


def beginnings(texts: Texts) -> list[str]:
    """The first words of texts that are spread over the file."""
    step = max(1, len(texts.texts) // PROMPTS)
    words = [text.split() for text in texts.texts[::step][:PROMPTS]]
    return [" ".join(part[: min(MOST_WORDS, max(1, len(part) // 3))]) for part in words if part]


def continued(model: Model, prompts: list[str], seed: int, layout: Layout | None = None) -> list[str]:
    """What a model writes after each prompt, drawn at `TEMPERATURE`, without special tokens."""
    tokenizer = load_tokenizer(model.directory, model.spec.vocab)
    ids = [[tokenizer.prefix, *encoding.ids] for encoding in tokenizer.encode(prompts)]
    room = max(1, min(NEW_TOKENS, model.spec.max_positions - max(map(len, ids))))
    options = DecodingOptions(room, (tokenizer.suffix,), tokenizer.known(model.spec.vocab), Sampling(TEMPERATURE), seed)
    generated = generate(model.spec, model.params, ids, options, layout=layout)
    return [tokenizer.decode(some) for some in generated]


def sample_texts(
    models: Mapping[str, Model], texts: Texts, seed: int, layout: Layout | None = None
) -> list[dict[str, str]]:
    """One entry per beginning: `prompt`, and by each model's name what it wrote after it."""
    prompts = beginnings(texts)
    entries = [{"prompt": prompt} for prompt in prompts]
    for name, model in models.items():
        for entry, text in zip(entries, continued(model, prompts, seed, layout), strict=True):
            entry[name] = text
    return entries
