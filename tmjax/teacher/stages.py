"""Stages of a run that ask a teacher: generated texts, probabilities of the target's tokens, features."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tmjax.activations import store
from tmjax.activations.store import Activations
from tmjax.errors import InputError
from tmjax.recipes.sources import SOURCE
from tmjax.runs.directory import RunDirectory
from tmjax.runs.manifest import Manifest, Record
from tmjax.runs.run_facts import GeneratedFacts, TeacherFacts
from tmjax.sharding import hosts
from tmjax.teacher.edges import Edges, edge_notes, measure_edges, needed_examples, save_edges
from tmjax.teacher.generation import GeneratedTexts, Generation, TextFilter, filter_texts, generate_texts
from tmjax.teacher.lines import Examples, keeps_lines
from tmjax.teacher.probabilities import Search, TeacherProbabilities
from tmjax.teacher.shared import probabilities_of_texts
from tmjax.teacher.span_features import capture_features
from tmjax.teacher.teacher_model import Teacher
from tmjax.teacher.vocabulary_map import few_shared
from tmjax.text.documents import Texts, read_texts
from tmjax.text.rows import Rows, TokenisedDocument
from tmjax.text.tokenizer import TextTokenizer

#: Makes the teacher when its stage has to be run: models are not loaded for stages that are finished.
TeacherFactory = Callable[[], Teacher]


@dataclass(frozen=True)
class TeacherStages:
    """Teacher data as stages of a run: each is computed once and read from its file afterwards.

    Every stage takes a `name`, which distinguishes teachers and texts, and a `key`, the JSON value that decides its
    result.

    Attributes:
        run: The run directory.
        step: Returns, for the name of a stage, what is called with (done, total) while it runs.
        warn: Called with a line that the user should read.
    """

    run: RunDirectory
    step: Callable[[str], Callable[[int, int], None]]
    warn: Callable[[str], None]

    def generated_texts(
        self,
        name: str,
        key: object,
        teacher: TeacherFactory,
        given: Texts,
        generation: Generation,
        *,
        seed: int,
        settings: TextFilter,
    ) -> GeneratedTexts:
        """Runs the stage `generate:NAME`, which writes `generated/NAME.jsonl`.

        Args:
            name: Who generates.
            key: Input hash of the stage.
            teacher: Makes the model that generates.
            given: Texts whose first words are the prompts.
            generation: Number of texts and sampling.
            seed: Seed of prompts and samples.
            settings: Which texts are kept.

        Returns:
            The kept texts; none of them is possible only with `settings.without`.

        Raises:
            InputError: No text is of use and `settings.without` is None.
        """
        stage = f"generate:{name}"

        def work(partial: Path) -> Record:
            texts, ended = generate_texts(teacher(), given.texts, generation, seed=seed, progress=self.step(stage))
            kept, facts = filter_texts(name, texts, ended, given, settings)
            if hosts.is_first():
                _write_generated(partial, kept)
            if not facts["kept"]:
                self.warn(
                    f"of {facts['asked']} texts by {name} {facts['foreign']} are foreign to the target and none is of "
                    f"use; {settings.without}"
                )
            return lambda manifest: manifest.record("generated", name, GeneratedFacts(**facts))

        path = self.run.stage(stage, key, f"generated/{name}.jsonl", work)
        if not self.run.manifest.generated[name].kept:
            return GeneratedTexts(Texts(str(path), (), ()), ())
        ended = [json.loads(line)["ended"] for line in path.read_text(encoding="utf-8").split("\n") if line]
        return GeneratedTexts(read_texts(str(path)), tuple(ended))

    def probabilities(
        self,
        name: str,
        key: object,
        teacher: TeacherFactory,
        target: TextTokenizer,
        texts: Sequence[str],
        *,
        max_tokens: int,
        search: Search | None = None,
        examples: Examples | None = None,
        advice: str | None = None,
    ) -> TeacherProbabilities:
        """Runs the stage `teacher:NAME`, which writes `teacher/NAME.npz`.

        Args:
            name: Teacher and texts.
            key: Input hash of the stage.
            teacher: Makes the model whose probabilities are wanted.
            target: The tokenizer of the tokens whose probabilities are wanted.
            texts: The texts.
            max_tokens: Most tokens of a text, in both vocabularies, prefix included.
            search: How far continuations are followed.
            examples: Given texts that the teacher reads before others.
            advice: What to do where no probability can be computed, appended to the error.

        Returns:
            Probabilities of the target's tokens.

        Raises:
            InputError: The two tokenizers share no position.
        """
        stage = f"teacher:{name}"

        def work(partial: Path) -> Record:
            try:
                probabilities, facts = probabilities_of_texts(
                    teacher(),
                    target,
                    texts,
                    max_tokens=max_tokens,
                    search=search,
                    examples=examples,
                    progress=self.step(stage),
                )
            except InputError as error:
                raise InputError(f"{error}; {advice}") if advice else error from None
            if hosts.is_first():
                probabilities.save(partial)
            return lambda manifest: manifest.record("teacher", name, TeacherFacts(**facts))

        return TeacherProbabilities.load(self.run.stage(stage, key, f"teacher/{name}.npz", work))

    def edges(
        self,
        key: object,
        models: Callable[[], tuple[Teacher, Teacher]],
        examples: Examples,
        *,
        name: str = SOURCE,
        max_tokens: int,
        search: Search | None = None,
    ) -> Edges:
        """Runs the stage `edges`, which writes `teacher/edges.json`; of further sources `edges:NAME`.

        Args:
            key: Input hash of the stage.
            models: Makes the source and the target.
            examples: The given texts; their `count` is wanted before prompts, None: as the source needs them.
            name: The source.
            max_tokens: Most tokens of a text, in both vocabularies, prefix included.
            search: How far continuations are followed.

        Returns:
            The edges of texts at which the source's probabilities are used, and the examples.
        """

        stage, lead = ("edges", "") if name == SOURCE else (f"edges:{name}", f"{name}: ")

        def work(partial: Path) -> Record:
            source, target = models()
            settings = {"max_tokens": max_tokens, "search": search or Search()}
            facts = used = measure_edges(source, target, examples.given, **settings)
            count = needed_examples(facts, examples.count)
            lines = (
                count > 0
                and not all(item.used for item in facts.values())
                and keeps_lines(source.tokenizer)
                and not any("\n" in text for text in examples.given)
            )
            if lines:
                before = replace(examples, count=count)
                used = measure_edges(source, target, examples.given, examples=before, **settings)
            for line in edge_notes(used, f"after {count} given texts " if lines else ""):
                self.warn(f"{lead}{line}")
            if hosts.is_first():
                save_edges(partial, used, count, lines=lines)

            def record(manifest: Manifest) -> None:
                after = {f"{edge} after examples": item for edge, item in used.items()} if lines else {}
                own = {f"{lead}{edge}": item for edge, item in (facts | after).items()}
                others = {edge: item for edge, item in (manifest.edges or {}).items() if _is_of_another(edge, lead)}
                manifest.edges = others | own

            return record

        return Edges.load(self.run.stage(stage, key, f"teacher/{stage.replace(':', '-')}.json", work))

    def warn_few_shared(self, name: str, lead: str = "") -> None:
        """Warns, in a line that begins with `lead`, if `teacher:NAME` has few of the target's positions."""
        facts = self.run.manifest.teacher[name]
        warning = few_shared(facts.positions, facts.of)
        if warning:
            self.warn(f"{lead}{warning}")

    def features(
        self,
        name: str,
        key: object,
        inputs: Callable[[], tuple[Teacher, Rows, Sequence[TokenisedDocument]]],
        layers: Sequence[int] | None = None,
    ) -> Activations:
        """Runs the stage `features:NAME`, which writes the activation store `features/NAME`.

        Args:
            name: Model and texts.
            key: Input hash of the stage.
            inputs: Makes the model, the spans, and the texts in the model's own tokens.
            layers: The layers that are stored; None: all.

        Returns:
            The stored features.
        """
        stage = f"features:{name}"

        def work(partial: Path) -> None:
            teacher, rows, documents = inputs()
            capture_features(teacher, rows, documents, partial, layers, progress=self.step(stage))

        key = key if layers is None else [key, list(layers)]
        return store.read(self.run.stage(stage, key, f"features/{name}", work))


def _is_of_another(edge: str, lead: str) -> bool:
    """Whether the entry of an edge belongs to another source than the one whose entries begin with `lead`."""
    return not edge.startswith(lead) if lead else ": " in edge


def _write_generated(path: Path, generated: GeneratedTexts) -> None:
    """Writes one JSON object per text: `id`, `text`, and whether it has `ended`."""
    with path.open("w", encoding="utf-8") as stream:
        for number, text, ended in zip(generated.texts.ids, generated.texts.texts, generated.ended, strict=True):
            stream.write(json.dumps({"id": number, "text": text, "ended": ended}, ensure_ascii=False) + "\n")
