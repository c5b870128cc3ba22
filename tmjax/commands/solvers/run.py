"""`tmjax solvers`: any set of solvers on one recipe's real activations, a stage each, so that a comparison resumes."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pydantic

from tmjax.align.alignment import align, plan_site, solver_of
from tmjax.commands.merge.run import Merge
from tmjax.commands.solvers.variants import SolverProblem, SolverRow, measure_site, summarise
from tmjax.errors import InputError
from tmjax.files.atomic import write_json
from tmjax.recipes.merge import AlignmentOptions
from tmjax.report.solver_page import write_solver_report
from tmjax.transfer.merge import fuse


def parse_solver(text: str, options: AlignmentOptions) -> AlignmentOptions:
    """Alignment options of a solver written `name` or `name:key=value:...`; raises InputError.

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
        found = AlignmentOptions.model_validate(options.model_dump() | shared | {"solver": name, "solver_options": own})
    except pydantic.ValidationError as error:
        raise InputError(f"solver {text!r}: {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from None
    solver_of(found)
    return found


class SolverComparison(Merge):
    """A run whose stages are activations and, per solver, its problems, its maps and its merge."""

    def compare(self, names: list[str]) -> dict[str, Any]:
        """Measures every solver; returns the manifest, with `solvers` (a line each) and `solver_sites` (per site)."""
        if not self.recipe.activations.keep:
            raise InputError("solvers are judged on held-out rows of activations; set activations.keep: true")
        settings = {name: parse_solver(name, self.recipe.alignment) for name in names}
        target, source = self.activations("target"), self.activations("source")
        projections = self.inputs.projections
        sites = list(
            dict.fromkeys(plan_site(s) for row in projections.values() for s in (row.input_site, row.output_site))
        )

        @functools.cache
        def problem(site: str, centred: bool) -> SolverProblem:
            return SolverProblem.of(site, target, source, centred=centred)

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
                    self.progress(name, done + 1, len(sites) + 1)
                result = {"sites": [dataclasses.asdict(row) for row in measured], "bits_per_byte": self._merge(options)}
                self.progress(name, len(sites) + 1, len(sites) + 1)
                write_json(partial, result)

            key = [self._fuse_key(name), options.model_dump(mode="json"), self.inputs.hashes.get("test")]
            file = self.run.stage(f"solver:{name}", key, f"solvers/{name}.json", work)
            held = json.loads(file.read_text(encoding="utf-8"))
            rows += [SolverRow(**row) for row in held["sites"]]
            if held["bits_per_byte"] is not None:
                merges[name] = held["bits_per_byte"]
        self.run.manifest["solvers"] = summarise(rows, merges)
        self.run.manifest["solver_sites"] = [dataclasses.asdict(row) for row in rows]
        self.run.save()
        write_solver_report(self.run.path, self.run.manifest)
        return self.run.manifest

    def _merge(self, options: AlignmentOptions) -> float | None:
        """Bits per byte on the test texts of the merge made with these plans; None without test texts.

        Weights alone are transported: blended embeddings and solved predictions would hide what the plans do.
        """
        if self.inputs.test is None:
            return None
        models = tuple((model.spec, model.params) for model in (self.inputs.target, self.inputs.source))
        held = self.activations("target"), self.activations("source")
        fused = fuse(
            align(*held, self.inputs.projections, options, models=models),
            self.inputs.target,
            self.inputs.source,
            self.recipe.fusion.model_copy(update={"lexical": None, "solve": None}),
            alpha=self.recipe.alpha,
            **self.inputs.validation,
        )
        scorer = self.inputs.scorer(self.inputs.target, self.inputs.target_tokenizer, self.inputs.test)
        return scorer(fused.model.params).bits_per_byte
