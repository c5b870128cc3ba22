"""What a merge solves toward: the source's probabilities of the target's next tokens, on given and on written texts."""

from pathlib import Path

import numpy as np

from tmjax.activations.joined import Joined, join
from tmjax.commands.generated_texts import write_texts
from tmjax.commands.merge.aligned import AlignmentRun
from tmjax.commands.merge.inputs import WITHOUT
from tmjax.errors import InputError
from tmjax.recipes.adapt import WrittenOptions
from tmjax.runs.manifest import Record, TeacherFacts
from tmjax.sharding import hosts
from tmjax.teacher.generation import Writing
from tmjax.teacher.probabilities import Search, Taught, teach_texts
from tmjax.teacher.vocabulary_map import few_shared
from tmjax.text.documents import read_texts
from tmjax.transfer.controls import Control, derangement
from tmjax.transfer.operators.predictions import Wanted, batch_tokens
from tmjax.typing import Params

#: Written texts that the target finds more foreign than so many times the given ones are left out, as in adaptation.
FOREIGN = WrittenOptions().foreign


def exchanged_tokens(vocab: int, known: np.ndarray | None, seed: int) -> np.ndarray:
    """For every row of a vocabulary another token [vocab], at random; rows that are no tokens (not `known`) stay."""
    tokens = np.arange(vocab) if known is None else np.nonzero(known)[0]
    result = np.arange(vocab)
    result[tokens] = tokens[derangement(len(tokens), seed)]
    return result


class Predictions:
    """The source's word on the texts of a merge, each part a stage of the run."""

    def __init__(self, run: AlignmentRun) -> None:
        self.run, self.inputs = run, run.inputs
        options = run.recipe.fusion.solve
        assert options is not None
        self.options = options

    @property
    def _longest(self) -> int:
        spec = self.inputs.target.spec
        return min(self.run.recipe.activations.max_tokens, spec.max_positions)

    def _key(self, which: str) -> list[object]:
        inputs, recipe = self.inputs, self.run.recipe
        hashes = [inputs.hashes[name] for name in ("texts", "source", "target")]
        told = self.options.written, self.options.tokens, recipe.activations.max_tokens, recipe.dtype, recipe.seed
        return [which, hashes, *told]

    def _params(self, which: str) -> Params:
        return self.run.random_source() if which == "random_source" else self.inputs.source.params

    def written(self, which: str) -> tuple[str, ...]:
        """Texts by `source` or `random_source`, the latter's no more, and of no more bytes, than the former's.

        None, with a warning, if all that the source writes is foreign to the target.
        """
        if not self.options.written:
            return ()
        inputs = self.inputs
        by_source = None if which == "source" else self.written("source")
        if by_source == ():
            return ()

        def work(partial: Path) -> Record:
            judge = (lambda texts: inputs.scorer(inputs.target, inputs.target_tokenizer, texts)), inputs.target.params
            facts = write_texts(
                partial,
                (inputs.source, self._params(which)),
                inputs.texts,
                Writing(self.options.written, tokens=self.options.tokens),
                name=which,
                seed=self.run.recipe.seed,
                dtype=inputs.dtype,
                layout=inputs.layout,
                progress=self.run.step(f"written:{which}"),
                familiar_to=judge if by_source is None else None,
                foreign=FOREIGN,
                first=None if by_source is None else len(by_source),
                most_bytes=None if by_source is None else sum(len(text.encode()) for text in by_source),
                required=False,
            )
            if not facts.kept:
                self.run.warn(
                    f"of {facts.asked} texts by {which} {facts.foreign} are foreign to the target and none is of "
                    "use; predictions are solved for on the calibration texts alone"
                )
            return lambda manifest: manifest.record("generated", which, facts)

        path = self.run.run.stage(f"written:{which}", self._key(which), f"written/{which}.jsonl", work)
        kept = self.run.run.manifest.generated[which].kept
        return read_texts(str(path)).texts if kept else ()

    def _taught(self, which: str, texts: tuple[str, ...]) -> Taught:
        inputs, name = self.inputs, f"predictions:{which}"

        def work(partial: Path) -> Record:
            try:
                found, facts = teach_texts(
                    inputs.source,
                    self._params(which),
                    inputs.target_tokenizer,
                    texts,
                    most=min(self._longest, inputs.source.spec.max_positions),
                    dtype=inputs.dtype,
                    layout=inputs.layout,
                    progress=self.run.step(name),
                )
            except InputError as error:
                raise InputError(f"{error}; {WITHOUT}") from None
            if hosts.is_first():
                found.save(partial)
            return lambda manifest: manifest.record("predictions", which, TeacherFacts(**facts))

        path = self.run.run.stage(name, self._key(which), f"predictions/{which}.npz", work)
        facts = self.run.run.manifest.predictions[which]
        warning = few_shared(facts.positions, facts.of)
        if warning and which == "source":
            self.run.warn(warning)
        return Taught.load(path)

    def wanted(self, control: Control | None) -> list[Wanted]:
        """Calibration and written texts in batches with what the source says, or what a control puts in its place.

        Rows shuffled: what is said elsewhere; plan permuted: the target's tokens exchanged; a random source: what that
        writes and says; a source contribution of zero: nothing is written or said. Raises InputError if there is
        nothing to be said because the two tokenizers never begin a token together.
        """
        inputs, seed = self.inputs, self.run.recipe.seed
        if control and control.zero_source:
            return self._batches(inputs.texts.texts, None)
        which = "random_source" if control and control.random_source else "source"
        texts = (*inputs.texts.texts, *self.written(which))
        held = self._taught(which, texts)
        if control and control.shuffle_rows:
            order = derangement(len(held.document), seed)
            held = held._replace(ids=held.ids[order], weight=held.weight[order])
        if control and control.permute_plan:
            vocab = inputs.target.spec.vocab
            others = exchanged_tokens(vocab, inputs.target_tokenizer.known(vocab), seed)
            held = held._replace(ids=others[held.ids].astype(np.int32))
        return self._batches(texts, held)

    def _batches(self, texts: tuple[str, ...], held: Taught | None) -> list[Wanted]:
        """Batches of the calibration texts, then of those that the source wrote, which are no truth."""
        tokenizer, spec, given = self.inputs.target_tokenizer, self.inputs.target.spec, len(self.inputs.texts)
        documents = [tokenizer.document(e.ids)[: self._longest] for e in tokenizer.encode(texts)]
        tokens = batch_tokens(spec.vocab, self.run.recipe.evaluation.batch_tokens)
        found = []
        for first, part in ((0, documents[:given]), (given, documents[given:])):
            for batch in join(spec, part, tokens, self.inputs.layout):
                said = _said(held, batch, first)
                found.append(Wanted(batch, first == 0, *said))
        return found


def _said(held: Taught | None, batch: Joined, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and probabilities [B, T, K] that are said at the tokens of a batch, whose texts count from `first`."""
    keep = Search().keep if held is None else held.ids.shape[1]
    ids, weight = (np.zeros((*batch.ids.shape, keep), kind) for kind in (np.int32, np.float32))
    if held is not None:
        # Rows of what is held are in the order of documents and of positions: found by one key for both.
        span = 1 + int(max(held.position.max(), batch.place.max()))
        told = held.document.astype(np.int64) * span + held.position
        asked = (batch.text.astype(np.int64) + first) * span + batch.place
        row = np.minimum(np.searchsorted(told, asked), len(told) - 1)
        known = (batch.text >= 0) & (told[row] == asked)
        ids[known], weight[known] = held.ids[row[known]], held.weight[row[known]]
    return ids, weight
