"""Source-written text in the closed form: what the source writes after the first words of the calibration texts.

Text drawn from the source and read by the target's tokenizer holds the source's distribution over the target's tokens
as it is, whatever the two vocabularies. The target's weights are solved for on calibration and written text together
(`solve`). Arms differ in who writes, or in nothing being written:

- `merged`: the source. `control:shrink`: nobody; calibration texts alone.
- `control:random_source`: the source's architecture with random weights. `control:self_source`: the target itself.
- `control:shuffled_rows`: the source, the words of every text after its beginning in another order.
- `control:permuted_plan`: the source, the target's token ids exchanged with each other.
- `same_size` (`--same-size-source`): another model, for comparison.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from solve import ROUNDS, Document, Operator, climb

from tmjax.convert.model import Model, load_model
from tmjax.evaluate.bits import Scores
from tmjax.evaluate.controls import derangement
from tmjax.hub.atomic import write_json
from tmjax.hub.checkpoint import read_json
from tmjax.hub.rundir import digest, sha256_files
from tmjax.hub.tokenizer import TextTokenizer, load_tokenizer
from tmjax.models.decoder import init_params
from tmjax.models.generate import write
from tmjax.models.sample import Sampling
from tmjax.pipeline.inputs import Inputs
from tmjax.pipeline.merge import evaluation_facts
from tmjax.recipe import Recipe

ARMS = (
    "merged",
    "control:shrink",
    "control:shuffled_rows",
    "control:self_source",
    "control:random_source",
    "control:permuted_plan",
)
#: Texts written after the beginning of each calibration text, in so many sets that take turns.
PER_TEXT, SETS = 9, 3
#: Beginnings are 1 to so many tokens of the writer's.
BEGINNING = 8
NEW_TOKENS = 64
BATCH = 256


@dataclass(frozen=True)
class Written:
    """A text, the number of its characters that were given, and whether its writer ended it."""

    text: str
    given: int
    ended: bool


def write_texts(
    model: Model, tokenizer: TextTokenizer, texts: Sequence[str], *, per_text: int, seed: int
) -> list[Written]:
    """What a model writes after random beginnings of the texts, drawn from its own distribution: [per_text * texts]."""
    generator = np.random.default_rng(seed)
    prompts = []
    for _ in range(per_text):
        for encoding in tokenizer.encode(texts):
            most = min(BEGINNING, len(encoding.ids) - 1)
            prompts.append(encoding.ids[: int(generator.integers(1, most + 1)) if most else 1])
    found: list[Written] = []
    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        told = [[tokenizer.prefix, *ids] for ids in some]
        numbers = range(start, start + len(some))
        how = {"ends": (tokenizer.suffix,), "sampling": Sampling(1.0), "seed": seed, "numbers": list(numbers)}
        size = {"prompt_tokens": BEGINNING + 1, "rows": min(BATCH, len(prompts))}
        for ids, new in zip(some, write(model.spec, model.params, told, NEW_TOKENS, **how, **size), strict=True):
            kept = [number for number in new if number not in tokenizer.special_ids]
            given = len(tokenizer.fast.decode(ids))
            found.append(Written(tokenizer.fast.decode([*ids, *kept]), given, len(new) < NEW_TOKENS))
    return found


def documents_of(target: Model, tokenizer: TextTokenizer, written: Sequence[Written]) -> list[Document]:
    """The texts as the target reads them; only tokens that begin after what was given count."""
    found = []
    for item, encoding in zip(written, tokenizer.encode([item.text for item in written]), strict=True):
        ids = tokenizer.document(encoding.ids)
        given = sum(start < item.given for start, _ in encoding.offsets)
        ids = ids if item.ended else ids[:-1]
        if len(ids) > given + 1:
            found.append(Document.of(ids, given, target.spec.max_positions))
    return found


def reordered(item: Written, generator: np.random.Generator) -> Written:
    """The text with the words after its beginning in a random order; the end of a word that was begun stays."""
    first, *words = item.text[item.given :].split(" ")
    after = " ".join([first, *generator.permutation(words)])
    return Written(item.text[: item.given] + after, item.given, item.ended)


def exchanged(document: Document, order: np.ndarray) -> Document:
    """The document in other tokens."""
    return Document(order[document.ids], order[document.label], document.weight)


class Arms:
    """The extra documents of every arm, written when first asked for."""

    def __init__(self, inputs: Inputs, per_text: int, same_size: str | None = None) -> None:
        self.inputs, self.per_text, self.same_size, self.seed = inputs, per_text, same_size, inputs.recipe.seed
        self._by_source: list[Written] | None = None

    def _written(self, model: Model, tokenizer: TextTokenizer) -> list[Written]:
        return write_texts(model, tokenizer, self.inputs.texts.texts, per_text=self.per_text, seed=self.seed)

    def _source_written(self) -> list[Written]:
        if self._by_source is None:
            self._by_source = self._written(self.inputs.source, self.inputs.source_tokenizer)
        return self._by_source

    def extra(self, arm: str) -> list[list[Document]]:
        """Sets of documents that take turns; none for `control:shrink`."""
        inputs, generator = self.inputs, np.random.default_rng(self.seed)
        if arm == "control:shrink":
            return []
        if arm == "control:random_source":
            params = init_params(inputs.source.spec, jax.random.key(self.seed))
            written = self._written(inputs.source.with_params(params), inputs.source_tokenizer)
        elif arm == "control:self_source":
            written = self._written(inputs.target, inputs.target_tokenizer)
        elif arm == "same_size":
            other = load_model(self.same_size)
            written = self._written(other, load_tokenizer(other.directory))
        else:
            written = self._source_written()
        if arm == "control:shuffled_rows":
            written = [reordered(item, generator) for item in written]
        documents = documents_of(inputs.target, inputs.target_tokenizer, written)
        if arm == "control:permuted_plan":
            plain = np.setdiff1d(np.arange(inputs.target.spec.vocab), list(inputs.target_tokenizer.special_ids))
            order = np.arange(inputs.target.spec.vocab)
            order[plain] = plain[derangement(len(plain), self.seed)]
            documents = [exchanged(document, order) for document in documents]
        return [documents[number::SETS] for number in range(SETS)]


def own_documents(inputs: Inputs) -> list[Document]:
    """The calibration texts as the target is scored on them."""
    tokenizer, most = inputs.target_tokenizer, inputs.target.spec.max_positions
    return [Document.of(tokenizer.document(e.ids), 0, most) for e in tokenizer.encode(inputs.texts.texts)]


def compared(
    recipe: Recipe,
    inputs: Inputs,
    extra: Callable[[str], list[list[Document]]],
    arms: Sequence[str],
    *,
    reach: str,
    rounds: int,
    progress: Callable[[str], None],
    out: Path,
) -> dict[str, Any]:
    """All arms through the same rounds on `valid`, each measured once on `test`: manifest facts.

    The folder `out` gets `ARM.json` with the losses per document as each arm is done, and those are not done again
    if code, recipe and rounds are the same; `scores.npz` at the end.
    """
    operator = Operator(inputs.target, reach)
    own = own_documents(inputs)
    test = inputs.scorer(inputs.target, inputs.target_tokenizer, inputs.test)
    files = [Path(module.__file__) for module in (sys.modules[name] for name in ("solve", __name__, extra.__module__))]
    told = recipe.model_dump(mode="json", exclude={"out"})
    key = digest([told, inputs.hashes, extra.__qualname__, extra.__module__, reach, rounds, sha256_files(files)])
    out.mkdir(parents=True, exist_ok=True)
    chosen: dict[str, Mapping[str, Any]] = {}

    def solved() -> Scores:
        found = climb(
            operator,
            own,
            extra(arm),
            lambda params: inputs.valid_scorer(params).bits_per_byte,
            rounds=rounds,
            progress=lambda text: progress(f"{arm}, {text}"),
        )
        chosen[arm] = {"valid": found.losses, "chosen": found.chosen, "trials": found.trials}
        return test(found.params)

    def given() -> Scores:
        if arm == "target":
            return test(inputs.target.params)
        return inputs.scorer(inputs.source, inputs.source_tokenizer, inputs.test)(inputs.source.params)

    scores: dict[str, Scores] = {}
    for arm in ("target", "source", *arms):
        file = out / f"{arm}.json"
        held = read_json(file) if file.is_file() else {}
        if held.get("key") != key:
            found = given() if arm in ("target", "source") else solved()
            lists = {name: np.asarray(getattr(found, name)).tolist() for name in ("nll", "bytes", "tokens")}
            held = {"key": key, **lists, "chosen": chosen.get(arm)}
            write_json(file, held)
        scores[arm] = Scores(*(np.asarray(held[name]) for name in ("nll", "bytes", "tokens")))
        chosen[arm] = held["chosen"]
        progress(f"{arm}: test {scores[arm].bits_per_byte:.4f}")
    np.savez(out / "scores.npz", bytes=test.bytes, **{arm: value.nll for arm, value in scores.items()})
    facts = evaluation_facts(scores, draws=recipe.evaluation.draws, seed=recipe.seed)
    return facts | {"chosen": {arm: value for arm, value in chosen.items() if value}}


def run(
    recipe: Recipe,
    progress: Callable[[str], None],
    *,
    reach: str = "blocks",
    rounds: int = ROUNDS,
    arms: Sequence[str] = ARMS,
    same_size: str | None = None,
) -> dict[str, Any]:
    """Source-written text on a recipe's models and texts; `same_size` names another source for one more arm."""
    inputs = Inputs(recipe)
    told = Arms(inputs, PER_TEXT, same_size)
    arms = (*arms, "same_size") if same_size else arms
    out = Path(recipe.out)
    return compared(recipe, inputs, told.extra, arms, reach=reach, rounds=rounds, progress=progress, out=out)
