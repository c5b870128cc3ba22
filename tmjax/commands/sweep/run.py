"""`tmjax sweep`: many settings of one recipe. Shared activations, plans and transports are made once."""

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
from tmjax.commands.callbacks import Progress, Warn, quiet, silent
from tmjax.commands.merge.session import open_session
from tmjax.commands.notes import note_hidden
from tmjax.commands.sweep.grid import coefficients_of, make_settings, parse_axes
from tmjax.commands.sweep.groups import Group, make_groups
from tmjax.commands.sweep.results import Result, best_of, has_parquet, read_csv, write_csv, write_parquet
from tmjax.commands.sweep.score import SettingsScorer
from tmjax.commands.sweep.shared_stages import Variant, contributing
from tmjax.errors import InputError
from tmjax.evaluate.facts import evaluation_facts
from tmjax.files.atomic import write_json
from tmjax.recipes.forward_dtype import with_dtype
from tmjax.recipes.merge import Recipe
from tmjax.report.sweep_page import write_sweep_report
from tmjax.runs.hashes import digest
from tmjax.runs.manifest import Manifest, Record
from tmjax.runs.run_facts import BestSetting, Coefficient, SweepFacts
from tmjax.sharding import hosts
from tmjax.text.documents import Texts
from tmjax.transfer.contribution import Coefficients, Contribution
from tmjax.transfer.operator import code_hashes, contributed_roles
from tmjax.transfer.update_table import joined_table, require_transfer

#: Called with the rows so far and the number of all settings.
Show = Callable[[Sequence[Mapping[str, Any]], int], None]


class Sweep:
    """A run of many settings, whose results are kept batch by batch."""

    def __init__(
        self,
        recipe: Recipe,
        grid: Sequence[str],
        *,
        random: int | None = None,
        write_best: bool = False,
        overwrite: bool = False,
        progress: Progress = quiet,
        warn: Warn = silent,
        show: Show = lambda rows, total: None,
    ) -> None:
        if recipe.valid is None:
            raise InputError("settings are compared on validation texts: give --valid FILE")
        recipe = with_dtype(recipe)
        if (
            recipe.mesh is None
        ):  # settings are split over data, so every device has whole models unless the recipe says otherwise
            recipe = recipe.model_copy(update={"mesh": f"data={jax.device_count()}"})
        self.axes = parse_axes(grid, recipe, random=random is not None)
        self.settings = make_settings(self.axes, recipe, random=random)
        self.groups = make_groups(recipe, self.settings)
        for group in self.groups:
            contributing(group.recipe)
            solver_of(group.recipe.located_alignment())
            if not group.recipe.activations.keep:
                require_streamable(group.recipe.located_alignment())
        self.random, self.write_best, self.show = random, write_best, show
        settings = {"sweep": digest({"grid": list(grid), "random": random})}
        self.session = open_session(recipe, overwrite=overwrite, progress=progress, warn=warn, extra_key=settings)
        self.recipe, self.inputs, self.run = self.session.recipe, self.session.inputs, self.session.run
        self._scorers: dict[tuple[str, str, bool], SettingsScorer] = {}
        self._latest: tuple[list[object], list[Contribution]] | None = None

    def _scorer(self, recipe: Recipe, which: str, *, stored: bool = False) -> SettingsScorer:
        """Makes the scorer of the `valid` or `test` texts."""
        name = (recipe.dtype, which, stored)
        if name not in self._scorers:
            texts: Texts = getattr(self.inputs, which)
            self._scorers[name] = SettingsScorer(
                self.inputs.target,
                self.inputs.target_tokenizer,
                texts,
                max_settings=max(len(group.members) for group in self.groups) if which == "valid" else 2,
                batch_tokens=recipe.evaluation.batch_tokens,
                max_tokens=recipe.evaluation.max_tokens,
                dtype=jnp.dtype(recipe.dtype),
                stored=stored,
                layout=self.inputs.layout,
            )
        return self._scorers[name]

    def _contributions(self, variant: Variant) -> list[Contribution]:
        """Returns the contributions with masks. Those of the last group are kept, as the next group may need them."""
        key = variant.key()
        if self._latest is None or self._latest[0] != key:
            self._latest = None  # before the next are made
            self._latest = (key, variant.contributions())
        return variant.masked(self._latest[1])

    def _coefficients(self, group: Group, number: int) -> dict[str, tuple[float, float]]:
        """Returns the coefficients of every role that an operator contributes to."""
        steps = contributing(group.recipe)
        roles = {role for step in steps for role in contributed_roles(step, self.inputs.projections)}
        return coefficients_of(group.recipe, self.settings[number], sorted(roles))

    def _results(self, number: int, group: Group) -> Iterator[list[Result]]:
        """Yields results of one group, batch by batch; those on disk are read."""
        variant = Variant(group.recipe, self.session)

        def result(member: int, bits: float | None, seconds: float, reason: str = "") -> Result:
            setting = self.settings[member]
            return Result(member, setting, bits, seconds, setting.get("seed", self.recipe.seed), number, reason)

        # Settings with the same coefficients are scored once.
        members: dict[tuple[Any, ...], list[int]] = {}
        for member in group.members:
            members.setdefault(tuple(self._coefficients(group, member).items()), []).append(member)
        scorer, items = self._scorer(group.recipe, "valid"), list(members.items())
        place = functools.cache(lambda: scorer.place(self._contributions(variant)))
        options = self.recipe.evaluation.model_dump(include={"batch_tokens", "max_tokens"})
        limits = [getattr(step.options, "mask_top_k", None) for step in contributing(group.recipe)]
        shared = [variant.key(), limits, self.inputs.hashes["valid"], options]
        for start in range(0, len(items), scorer.batch):
            batch = items[start : start + scorer.batch]
            file = self.run.path / "settings" / f"{digest([shared, [pairs for pairs, _ in batch]])}.json"
            try:
                scores = hosts.agree(_read(file)) or self._score(file, scorer, place(), [dict(p) for p, _ in batch])
            except InputError as error:
                yield [result(member, None, 0.0, str(error)) for _, members in items[start:] for member in members]
                return
            missing = "the model's log-likelihoods hold NaN or infinity"
            yield [
                result(member, bits, scores["seconds"], missing if bits is None else "")
                for bits, (_, members) in zip(scores["bits_per_byte"], batch, strict=True)
                for member in members
            ]

    def _score(
        self,
        file: Path,
        scorer: SettingsScorer,
        contributions: Sequence[Contribution],
        settings: Sequence[Coefficients],
    ) -> dict[str, Any]:
        compiling, started = scorer.compile_seconds, time.perf_counter()
        bits = scorer.bits_per_byte(scorer(contributions, settings))
        seconds = time.perf_counter() - started - (scorer.compile_seconds - compiling)
        scores = {
            "bits_per_byte": [float(value) if np.isfinite(value) else None for value in bits],
            "seconds": round(seconds / len(settings), 6),
        }
        if hosts.is_first():
            file.parent.mkdir(exist_ok=True)
            write_json(file, scores)
        return scores

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
            label = digest(Variant(self.groups[best.group].recipe, self.session).source.alignment_key())[:8]
            facts = self._facts(results, best)

            def record(manifest: Manifest) -> None:
                manifest.sweep = facts
                manifest.alignment = manifest.shared_facts(label).alignment or {}

            return record

        key = [self.settings, [self._fuse_options(group.recipe) for group in self.groups], self.inputs.hashes["valid"]]
        self.run.stage("sweep", key, "results.csv", work)
        self._best(key)

        def report(partial: Path) -> None:
            write_sweep_report(partial, self.run.path, self.run.manifest.to_json(), self.rows())

        key = self.run.manifest.to_json({"sweep", "evaluation"})
        self.run.stage("report", key, "sweep.html", report, joint=False)
        return self.run.manifest.to_json()

    def rows(self) -> list[dict[str, Any]]:
        """Returns the finished sweep's table, a mapping per setting."""
        return read_csv(self.run.path / "results.csv")

    def _fuse_options(self, recipe: Recipe) -> list[object]:
        variant = Variant(recipe, self.session)
        options = recipe.model_dump(mode="json", include={"operators", "coefficients", "alpha"})
        code = code_hashes(contributing(recipe))
        return [variant.source.alignment_key(), options, *([code] if code else [])]

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

    def _best(self, settings_key: object) -> None:
        """Measures the best setting and the target on the test texts, once; writes its checkpoint if requested."""
        best = self.run.manifest.sweep.best
        group = next(group for group in self.groups if best.setting in group.members)
        pairs = self._coefficients(group, best.setting)
        variant, target = Variant(group.recipe, self.session), self.inputs.target

        def evaluate(partial: Path) -> Record:
            scorer = self._scorer(group.recipe, "test", stored=True)
            arms = {"target": dict.fromkeys(pairs, (0.0, 0.0)), "best": pairs}
            contributions = scorer.place(self._contributions(variant))
            both = [scorer(contributions, [setting])[0] for setting in arms.values()]
            scores = {arm: scorer.scores(nll) for arm, nll in zip(arms, both, strict=True)}
            if hosts.is_first():
                with partial.open("wb") as stream:
                    np.savez(stream, bytes=scores["best"].bytes, **{arm: value.nll for arm, value in scores.items()})
            options = self.recipe.evaluation
            note_hidden(scores, self.session.warn)
            evaluated = evaluation_facts(scores, draws=options.draws, seed=self.recipe.seed)

            def record(manifest: Manifest) -> None:
                evaluated.record(manifest)
                manifest.sweep.test_compilations = scorer.compilations

            return record

        def write(partial: Path) -> Record:
            contributions, fused = self._contributions(variant), dict(target.params)
            for each in contributions:
                fused = each.rule(fused, each.items, pairs)
            table = joined_table(each.rule.rows(target.params, fused, each.items, pairs) for each in contributions)
            if warning := require_transfer(table, allow_negligible=True):
                self.session.warn(warning)
            hf.write(target.with_params(fused), partial, max_shard_size=self.recipe.export.max_shard_size)

            def record(manifest: Manifest) -> None:
                manifest.update = table

            return record

        if self.inputs.test is not None:
            options = self.recipe.evaluation.model_dump()
            key = [settings_key, best.model_dump(), self.inputs.hashes["test"], options, self.recipe.seed]
            self.run.stage("evaluate", key, "scores.npz", evaluate)
        if self.write_best:
            self.run.stage("best", [settings_key, best.model_dump()], "best", write)


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
