"""`tmjax sweep`: many settings of one recipe; activations, plans and transports are made once for those that share."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.align.alignment import solver_of
from tmjax.align.streaming import require_streamable
from tmjax.checkpoints import hf
from tmjax.commands.merge.aligned import AlignmentRun, Progress, Warn, quiet
from tmjax.commands.merge.inputs import Inputs
from tmjax.commands.notes import note_hidden
from tmjax.commands.sweep.grid import coefficients_of, make_settings, parse_axes
from tmjax.commands.sweep.groups import Group, make_groups
from tmjax.commands.sweep.results import Result, best_of, has_parquet, read_csv, write_csv, write_parquet
from tmjax.commands.sweep.score import SettingsScorer
from tmjax.errors import InputError
from tmjax.evaluate.facts import evaluation_facts
from tmjax.files.atomic import write_json
from tmjax.models.spec import projections
from tmjax.recipes.merge import FusionOptions, Recipe
from tmjax.report.sweep_page import write_sweep_report
from tmjax.runs.directory import RunDirectory
from tmjax.runs.hashes import digest
from tmjax.runs.manifest import AlignmentRecord, BestSetting, Coefficient, Manifest, Record, SweepFacts
from tmjax.sharding import hosts
from tmjax.text.documents import Texts
from tmjax.transfer.apply import Coefficients, Transported, fuse_params, transport_model
from tmjax.transfer.masks import masks
from tmjax.transfer.update_table import require_transfer, update_table

#: Called with the rows so far and the number of all settings.
Show = Callable[[Sequence[Mapping[str, Any]], int], None]
#: What no setting changes, and what changes only with the settings of activations.
_SHARED = ("layout", "source", "target", "source_tokenizer", "target_tokenizer", "valid", "test")
_OF_ACTIVATIONS = ("texts", "rows", "hashes")


class _SharedStages:
    """A run in which every stage has a name and a folder of its own for each input hash, so that variants share it."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run

    def stage(self, name: str, key: object, output: str, work: Callable[[Path], AlignmentRecord]) -> Path:
        label = digest(key)[:8]

        def labelled(partial: Path) -> Record:
            record = work(partial)
            return lambda manifest: record(manifest.shared_facts(label))

        return self._run.stage(f"{name}:{label}", key, f"shared/{label}/{output}", labelled)


class _Variant(AlignmentRun):
    """The alignment of one recipe of a sweep, inside the sweep's run directory."""

    def __init__(self, recipe: Recipe, sweep: "Sweep") -> None:
        self.recipe, self.inputs = recipe, Inputs(recipe)
        same = recipe.activations == sweep.recipe.activations
        for name in _SHARED + (_OF_ACTIVATIONS if same else ()):
            self.inputs.__dict__[name] = getattr(sweep.inputs, name)
        self.progress, self.warn, self.run = sweep.progress, sweep.warn, _SharedStages(sweep.run)
        self._alignment = None

    def transport_key(self) -> list[object]:
        """What decides the transported weights; masks are put on afterwards."""
        told = self.recipe.fusion.model_dump(mode="json", include={"map", "roles", "norm_match", "bias"})
        return [self._alignment_key(), told]

    def transport(self) -> dict[str, Transported]:
        """The transported weights, without masks."""
        target, source = self.inputs.target, self.inputs.source
        plain = FusionOptions()
        for name in ("embeddings", "norms", "fit", "trust", "base", "transport"):
            if getattr(self.recipe.fusion, name) != getattr(plain, name):
                raise InputError(
                    f"a sweep fuses transported projections by given coefficients: leave fusion.{name} out"
                )
        options = self.recipe.fusion.model_copy(update={"mask_top_k": None})
        return transport_model(self.align(), target.rows, target.params, source.rows, source.params, options)

    def masked(self, transported: Mapping[str, Transported]) -> dict[str, Transported]:
        """The same with the masks of this recipe."""
        rows, top_k = projections(self.inputs.target.rows), self.recipe.fusion.mask_top_k
        pairs = {role: masks(self.align(), rows[role], top_k) for role in transported}
        return {
            role: dataclasses.replace(item, weight_mask=pairs[role][0], bias_mask=pairs[role][1])
            for role, item in transported.items()
        }


class Sweep(AlignmentRun):
    """A run of many settings; what is finished is kept, batch by batch."""

    def __init__(
        self,
        recipe: Recipe,
        grid: Sequence[str],
        *,
        random: int | None = None,
        write_best: bool = False,
        overwrite: bool = False,
        progress: Progress = quiet,
        warn: Warn = lambda message: None,
        show: Show = lambda rows, total: None,
    ) -> None:
        if recipe.valid is None:
            raise InputError("settings are compared on validation texts: give --valid FILE")
        if recipe.mesh is None:  # settings are split over data, so the models are whole on every device unless told
            recipe = recipe.model_copy(update={"mesh": f"data={jax.device_count()}"})
        self.axes = parse_axes(grid, recipe, random=random is not None)
        self.settings = make_settings(self.axes, recipe, random=random)
        self.groups = make_groups(recipe, self.settings)
        for group in self.groups:
            solver_of(group.recipe.alignment)
            if not group.recipe.activations.keep:
                require_streamable(group.recipe.alignment)
        self.random, self.write_best, self.show = random, write_best, show
        told = {"grid": list(grid), "random": random}
        super().__init__(recipe, overwrite=overwrite, progress=progress, warn=warn, also={"sweep": digest(told)})
        self._scorers: dict[tuple[str, str, bool], SettingsScorer] = {}
        self._held: tuple[list[object], dict[str, Transported]] | None = None

    def _scorer(self, recipe: Recipe, which: str, *, stored: bool = False) -> SettingsScorer:
        """Scorer of the `valid` or `test` texts."""
        name = (recipe.dtype, which, stored)
        if name not in self._scorers:
            texts: Texts = getattr(self.inputs, which)
            self._scorers[name] = SettingsScorer(
                self.inputs.target,
                self.inputs.target_tokenizer,
                texts,
                most=max(len(group.members) for group in self.groups) if which == "valid" else 2,
                batch_tokens=recipe.evaluation.batch_tokens,
                max_tokens=recipe.evaluation.max_tokens,
                dtype=jnp.dtype(recipe.dtype),
                stored=stored,
                layout=self.inputs.layout,
            )
        return self._scorers[name]

    def _transported(self, variant: _Variant) -> dict[str, Transported]:
        """The transported weights with masks; those of the last group are kept, of which the next may need all."""
        key = variant.transport_key()
        if self._held is None or self._held[0] != key:
            self._held = None  # before the next are made
            self._held = (key, variant.transport())
        return variant.masked(self._held[1])

    def _coefficients(self, group: Group, number: int) -> dict[str, tuple[float, float]]:
        return coefficients_of(group.recipe, self.settings[number], sorted(self.inputs.projections))

    def _results(self, number: int, group: Group) -> Iterator[list[Result]]:
        """Results of one group, batch by batch; those on disk are read."""
        variant = _Variant(group.recipe, self)

        def result(member: int, bits: float | None, seconds: float, reason: str = "") -> Result:
            setting = self.settings[member]
            return Result(member, setting, bits, seconds, setting.get("seed", self.recipe.seed), number, reason)

        # Settings that come to the same coefficients are scored once.
        wanted: dict[tuple[Any, ...], list[int]] = {}
        for member in group.members:
            wanted.setdefault(tuple(self._coefficients(group, member).items()), []).append(member)
        scorer, items = self._scorer(group.recipe, "valid"), list(wanted.items())
        place = functools.cache(lambda: scorer.place(self._transported(variant)))
        options = self.recipe.evaluation.model_dump(include={"batch_tokens", "max_tokens"})
        shared = [variant.transport_key(), group.recipe.fusion.mask_top_k, self.inputs.hashes["valid"], options]
        for start in range(0, len(items), scorer.batch):
            batch = items[start : start + scorer.batch]
            file = self.run.path / "settings" / f"{digest([shared, [pairs for pairs, _ in batch]])}.json"
            try:
                held = hosts.agree(_read(file)) or self._score(
                    file, scorer, place(), [dict(p) for p, _ in batch], group.recipe
                )
            except InputError as error:
                yield [result(member, None, 0.0, str(error)) for _, members in items[start:] for member in members]
                return
            missing = "the model's log-likelihoods hold NaN or infinity"
            yield [
                result(member, bits, held["seconds"], missing if bits is None else "")
                for bits, (_, members) in zip(held["bits_per_byte"], batch, strict=True)
                for member in members
            ]

    def _score(
        self,
        file: Path,
        scorer: SettingsScorer,
        transported: Mapping[str, Transported],
        settings: Sequence[Coefficients],
        recipe: Recipe,
    ) -> dict[str, Any]:
        compiling, started = scorer.compile_seconds, time.perf_counter()
        bits = scorer.bits_per_byte(scorer(transported, settings, bias_rule=recipe.fusion.bias))
        seconds = time.perf_counter() - started - (scorer.compile_seconds - compiling)
        held = {
            "bits_per_byte": [float(value) if np.isfinite(value) else None for value in bits],
            "seconds": round(seconds / len(settings), 6),
        }
        if hosts.is_first():
            file.parent.mkdir(exist_ok=True)
            write_json(file, held)
        return held

    def sweep(self) -> dict[str, Any]:
        """Scores all settings; the best one and the target are measured on the test texts. Returns the manifest."""

        def work(partial: Path) -> Record:
            results: list[Result] = []
            rows: list[dict[str, Any]] = []
            for number, group in enumerate(self.groups):
                for some in self._results(number, group):
                    results.extend(some)
                    rows += [result.cells() for result in some]
                    self.show(rows, len(self.settings))
            results.sort(key=lambda result: result.number)
            best = best_of(results)
            if best is None:
                raise InputError(f"all {len(results)} settings failed: {results[0].reason}")
            if hosts.is_first():
                write_csv(partial, results)
                if has_parquet():
                    write_parquet(self.run.path / "results.parquet", results)
            label = digest(_Variant(self.groups[best.group].recipe, self)._alignment_key())[:8]
            facts = self._facts(results, best)

            def record(manifest: Manifest) -> None:
                manifest.sweep, manifest.alignment = facts, manifest.shared[label].alignment

            return record

        told = [self.settings, [self._fuse_options(group.recipe) for group in self.groups], self.inputs.hashes["valid"]]
        self.run.stage("sweep", told, "results.csv", work)
        self._best(told)

        def report(partial: Path) -> None:
            write_sweep_report(partial, self.run.path, self.run.manifest.to_json(), self.rows())

        facts = self.run.manifest.to_json({"sweep", "evaluation"})
        self.run.stage("report", facts, "sweep.html", report, joint=False)
        return self.run.manifest.to_json()

    def rows(self) -> list[dict[str, Any]]:
        """The finished sweep's table, a mapping per setting."""
        return read_csv(self.run.path / "results.csv")

    def _fuse_options(self, recipe: Recipe) -> list[object]:
        return [_Variant(recipe, self)._alignment_key(), recipe.fusion.model_dump(mode="json"), recipe.alpha]

    def _facts(self, results: Sequence[Result], best: Result) -> SweepFacts:
        scorers = self._scorers.values()
        done = [result.seconds for result in results if result.bits_per_byte is not None]
        pairs = self._coefficients(self.groups[best.group], best.number)
        return SweepFacts(
            keys=list(self.settings[0]),
            settings=len(results),
            random=self.random,
            groups=len(self.groups),
            devices=max(scorer.devices for scorer in scorers),
            failed=sum(result.bits_per_byte is None for result in results),
            compilations=sum(scorer.compilations for scorer in scorers),
            compile_seconds=round(sum(scorer.compile_seconds for scorer in scorers), 3),
            seconds_per_setting=round(float(np.median(done)), 6),
            best=BestSetting(
                setting=best.number,
                values=best.setting,
                valid_bits_per_byte=best.bits_per_byte,
                coefficients={role: Coefficient(alpha=alpha, beta=beta) for role, (alpha, beta) in pairs.items()},
            ),
        )

    def _best(self, told: object) -> None:
        """Measures the best setting and the target on the test texts, once, and writes its checkpoint if asked to."""
        best = self.run.manifest.sweep.best
        group = next(group for group in self.groups if best.setting in group.members)
        pairs = self._coefficients(group, best.setting)
        variant = _Variant(group.recipe, self)

        def evaluate(partial: Path) -> Record:
            scorer = self._scorer(group.recipe, "test", stored=True)
            arms = {"target": dict.fromkeys(pairs, (0.0, 0.0)), "best": pairs}
            transported = scorer.place(self._transported(variant))
            both = [scorer(transported, [setting], bias_rule=group.recipe.fusion.bias)[0] for setting in arms.values()]
            scores = {arm: scorer.scores(nll) for arm, nll in zip(arms, both, strict=True)}
            if hosts.is_first():
                with partial.open("wb") as stream:
                    np.savez(stream, bytes=scores["best"].bytes, **{arm: value.nll for arm, value in scores.items()})
            options = self.recipe.evaluation
            note_hidden(scores, self.warn)
            facts = evaluation_facts(scores, draws=options.draws, seed=self.recipe.seed)

            def record(manifest: Manifest) -> None:
                manifest.evaluation = facts.evaluation
                manifest.sweep.test_compilations = scorer.compilations

            return record

        def write(partial: Path) -> Record:
            target, transported = self.inputs.target, self._transported(variant)
            fused = fuse_params(target.rows, target.params, transported, pairs, bias_rule=group.recipe.fusion.bias)
            table = update_table(target.spec, target.rows, target.params, fused, transported, pairs)
            if warning := require_transfer(table, allow_negligible=True):
                self.warn(warning)
            hf.write(target.with_params(fused), partial, max_shard_size=self.recipe.export.max_shard_size)

            def record(manifest: Manifest) -> None:
                manifest.update = table

            return record

        if self.inputs.test is not None:
            options = self.recipe.evaluation.model_dump()
            key = [told, best.model_dump(), self.inputs.hashes["test"], options, self.recipe.seed]
            self.run.stage("evaluate", key, "scores.npz", evaluate)
        if self.write_best:
            self.run.stage("best", [told, best.model_dump()], "best", write)


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
