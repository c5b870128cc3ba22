"""`tmjax solvers`: solvers on the activations of one recipe, a stage each, so that a comparison resumes."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pydantic

from tmjax.align.alignment import align, plan_site, solver_of
from tmjax.commands.callbacks import Progress, Warn, quiet, silent
from tmjax.commands.merge.context import merge_context
from tmjax.commands.merge.run import Merge
from tmjax.commands.solvers.variants import SolverProblem, SolverRow, measure_site, summarise
from tmjax.errors import InputError
from tmjax.files.atomic import write_json
from tmjax.recipes.merge import AlignmentOptions, Recipe
from tmjax.report.solver_page import write_solver_report
from tmjax.transfer.chain import apply_chain


def parse_solver(text: str, options: AlignmentOptions) -> AlignmentOptions:
    """Parses a solver written `name` or `name:key=value:...` into alignment options; raises InputError.

    `epsilon`, `threshold` and `max_iterations` replace the recipe's, other keys are the solver's own.
    """
    name, *pairs = text.split(":")
    if "." in name and pairs:  # package.module:Class or FILE.py:Class
        name, *pairs = f"{name}:{pairs[0]}", *pairs[1:]
    own: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"solver {text!r}: write name:key=value, for example sinkhorn:epsilon=0.1")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        (shared if key in ("epsilon", "threshold", "max_iterations") else own)[key] = parsed
    try:
        alignment = AlignmentOptions.model_validate(
            options.model_dump() | shared | {"solver": name, "solver_options": own}
        )
    except pydantic.ValidationError as error:
        raise InputError(f"solver {text!r}: {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from None
    solver_of(alignment)
    return alignment


class SolverComparison:
    """A run whose stages are activations and, for every solver, its problems, maps and merge."""

    def __init__(
        self, recipe: Recipe, *, overwrite: bool = False, progress: Progress = quiet, warn: Warn = silent
    ) -> None:
        self.merge = Merge(recipe, overwrite=overwrite, progress=progress, warn=warn)
        self.run = self.merge.run

    def compare(self, names: list[str]) -> dict[str, Any]:
        """Measures every solver; returns the manifest with `solvers` (one entry each) and `solver_sites` (per site)."""
        merge, session = self.merge, self.merge.session
        if not merge.recipe.activations.keep:
            raise InputError("solvers are judged on held-out rows of activations; set activations.keep: true")
        settings = {name: parse_solver(name, merge.recipe.alignment) for name in names}
        pair = merge.view().activations()
        projections = merge.inputs.projections
        sites = list(
            dict.fromkeys(plan_site(s) for row in projections.values() for s in (row.input_site, row.output_site))
        )

        @functools.cache
        def problem(site: str, centred: bool) -> SolverProblem:
            return SolverProblem.of(site, pair.target, pair.source, centred=centred)

        rows: list[SolverRow] = []
        merges: dict[str, float] = {}
        for name, options in settings.items():

            def work(partial: Path, name: str = name, options: AlignmentOptions = options) -> None:
                measured = []
                for done, site in enumerate(sites):
                    solver = solver_of(options)
                    measured.append(
                        measure_site(name, solver, problem(site, options.centred), memory_mib=options.memory_mib)
                    )
                    session.progress(name, done + 1, len(sites) + 1)
                bits = self._bits_per_byte(options)
                session.progress(name, len(sites) + 1, len(sites) + 1)
                write_json(partial, {"sites": [dataclasses.asdict(row) for row in measured], "bits_per_byte": bits})

            key = [merge.fuse_key(name), options.model_dump(mode="json"), merge.inputs.hashes.get("test")]
            file = session.stage(f"solver:{name}", key, f"solvers/{name}.json", work)
            result = json.loads(file.read_text(encoding="utf-8"))
            rows += [SolverRow(**row) for row in result["sites"]]
            if result["bits_per_byte"] is not None:
                merges[name] = result["bits_per_byte"]
        self.run.manifest.solvers = summarise(rows, merges)
        self.run.manifest.solver_sites = [dataclasses.asdict(row) for row in rows]
        self.run.save()
        manifest = self.run.manifest.to_json()
        write_solver_report(self.run.path, manifest)
        return manifest

    def _bits_per_byte(self, options: AlignmentOptions) -> float | None:
        """Scores the merge made with these plans on the test texts; None without test texts.

        Only contributions are fused: blended embeddings and solved predictions would hide the effect of the plans.
        """
        merge, inputs = self.merge, self.merge.inputs
        if inputs.test is None:
            return None
        models = tuple((model.spec, model.params) for model in (inputs.target, inputs.source))
        view = merge.view()
        alignment = align(*view.activations(), inputs.projections, options, models=models)
        chain = tuple(step for step in inputs.chain if step.contributes)
        context = merge_context(merge.session, "merge")
        merged = apply_chain(chain, dataclasses.replace(view, alignment=lambda: alignment), context)
        scorer = inputs.scorer(inputs.target, inputs.target_tokenizer, inputs.test)
        return scorer(merged.model.params).bits_per_byte
