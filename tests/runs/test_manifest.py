"""The manifest of a run: which keys its file has, that it reads back as it was, and runs of other formats."""

import json
from pathlib import Path

import pydantic
import pytest

from tmjax import cli
from tmjax.errors import InputError
from tmjax.runs.directory import RunDirectory, resumes
from tmjax.runs.manifest import FORMAT, MANIFEST, Manifest, load_manifest, read_manifest
from tmjax.runs.run_facts import (
    CoefficientFacts,
    ControlFacts,
    EvaluationFacts,
    GeneratedFacts,
    HeadCounts,
    LayerPlanFacts,
    PlanFacts,
    RowFacts,
    ScheduleFacts,
    SourceGain,
    TeacherFacts,
    TrainingFacts,
)

KEY = {"recipe": "1"}
#: Keys of every manifest, and those that an adaptation has from its beginning.
ALWAYS = {
    "format", "tmjax", "seed", "inputs", "notes", "evaluation", "source_gain", "update", "alignment", "mesh", "devices",
    "platform", "versions", "key", "stages", "outputs",
}  # fmt: skip
FIT = {"by_role": {"q": {"alpha": 0.1, "beta": -0.1}}, "valid_bits_per_byte": 2.0, "trials": []}
SCHEDULE = {
    "lr": 1e-3, "folder": "lr-0.001", "planned_steps": 3, "steps": 3, "stopped_early": False, "best_step": 2,
    "valid_bits_per_byte": None, "valid_history": [[0, 2.5]], "shapes": [[1, 16]], "texts": 4,
}  # fmt: skip


def header(**more) -> Manifest:
    return Manifest(tmjax="0", seed=0, inputs={}, key=KEY, mesh={"data": 1}, devices=1, platform="cpu", **more)


def test_keys_of_a_run_that_has_just_begun(tmp_path) -> None:
    RunDirectory.start(tmp_path / "run", "a: 1\n", header(processes=1)).close()
    assert set(read_manifest(tmp_path / "run")) == ALWAYS | {"processes"}
    assert set(header(training={}, generated={}, teacher={}).to_json()) == ALWAYS | {"training", "generated", "teacher"}
    assert next(iter(header().to_json())) == "format"


def test_keys_of_what_stages_record_and_that_it_reads_back(tmp_path) -> None:
    run = RunDirectory.start(tmp_path / "run", "a: 1\n", header())

    def record(manifest: Manifest) -> None:
        manifest.rows = RowFacts(documents=2, rows=9, pooling="span")
        manifest.alignment = {
            "q": PlanFacts(
                problems=1,
                converged=1,
                max_marginal_error=None,
                max_iterations=3,
                log_domain=0,
                pairs=4,
                stored="dense",
            )
        }
        manifest.layer_plans = {"q": LayerPlanFacts(dropped_mean=0.1, dropped_max=0.2)}
        manifest.attention = {"target": HeadCounts(heads=4, kv_heads=2)}
        manifest.update = {"w": {"alpha": 0.1}}
        manifest.coefficients = CoefficientFacts(**FIT)
        operators = {"embeddings": {"chosen": {"kappa": 0.5, "frequent": 3}, "trials": 4}}
        manifest.operators = operators
        manifest.record("controls", "control:shrink", ControlFacts(**FIT, update={}, operators=operators))
        manifest.record("generated", "source", GeneratedFacts(asked=3, foreign=1, kept=2))
        manifest.record("teacher", "source-on-source", TeacherFacts(positions=3, of=4, mass=0.9))
        tried = [ScheduleFacts(**SCHEDULE, teacher_positions=3)]
        arm = {"mode": "sft", "terms": ["distillation"], "texts_by": None, "init": "target"}
        manifest.record("training", "adapted", TrainingFacts(**SCHEDULE, teacher_positions=3, **arm, tried=tried))
        score = {"bits_per_byte": 1.9, "ci95": [1.8, 2.0]}
        manifest.evaluation = {"merged": EvaluationFacts(**score, documents=2, bytes=10, tokens=4)}
        manifest.source_gain = SourceGain(**score, fraction_of_gap=None, fraction_ci95=None, best_control="control:sft")

    run.stage("fuse", "x", "merged", lambda partial: record)
    values = json.loads((tmp_path / "run" / MANIFEST).read_text())
    assert values == run.manifest.to_json() == load_manifest(tmp_path / "run").to_json()
    sections = ("rows", "layer_plans", "attention", "coefficients", "operators", "controls", "generated")
    assert set(values) == ALWAYS | {*sections, "teacher", "training"}
    assert set(values["stages"]["fuse"]) == {"seconds", "peak_rss_mib", "reused"}
    assert values["alignment"]["q"]["max_marginal_error"] is None and values["attention"]["target"]["kv_heads"] == 2
    assert set(values["controls"]["control:shrink"]) == {*FIT, "update", "operators"}
    assert set(values["training"]["adapted"]) == {
        *SCHEDULE,
        "teacher_positions",
        "mode",
        "terms",
        "texts_by",
        "init",
        "tried",
    }
    assert set(values["evaluation"]["merged"]) == {"bits_per_byte", "ci95", "documents", "bytes", "tokens"}
    assert values["source_gain"]["fraction_of_gap"] is None
    assert json.dumps(values["operators"]["embeddings"]["chosen"]) == '{"kappa": 0.5, "frequent": 3}', (
        "a whole number stays one"
    )


def test_facts_of_alignments_go_where_the_caller_says(tmp_path) -> None:
    def record(facts) -> None:
        facts.rows = RowFacts(documents=2, rows=9, pooling="span")

    manifest = header()
    for label in ("aa", "bb", "aa"):
        record(manifest.shared_facts(label))
    record(manifest)
    rows = {"documents": 2, "rows": 9, "pooling": "span"}
    assert manifest.to_json()["shared"] == {"aa": {"rows": rows}, "bb": {"rows": rows}}
    assert manifest.to_json()["rows"] == rows


def test_unknown_keys_and_wrong_kinds_are_refused(tmp_path) -> None:
    with pytest.raises(pydantic.ValidationError):
        header(sead=1)
    with pytest.raises(pydantic.ValidationError):
        header().coefficients = {"by_role": 3}
    run = tmp_path / "run"
    RunDirectory.start(run, "a: 1\n", header()).close()
    values = json.loads((run / MANIFEST).read_text())
    (run / MANIFEST).write_text(json.dumps(values | {"sead": 1}))
    with pytest.raises(InputError, match=r"no manifest of tmjax: sead"):
        load_manifest(run)


@pytest.mark.parametrize("number", [None, 1, FORMAT + 1])
def test_a_run_of_another_format_is_refused(tmp_path, number, capsys) -> None:
    run = tmp_path / "run"
    RunDirectory.start(run, "a: 1\n", header()).close()
    values = json.loads((run / MANIFEST).read_text())
    del values["format"]
    (run / MANIFEST).write_text(json.dumps(values if number is None else values | {"format": number}))
    assert not resumes(run, KEY)
    told = rf"run is a run of format {number or 1}, made by tmjax 0; this version reads format {FORMAT}: run its recipe"
    for action in (read_manifest, load_manifest, lambda path: RunDirectory.start(path, "a: 1\n", header())):
        with pytest.raises(InputError, match=told):
            action(run)
    assert cli.run(["report", str(run)]) == 2 and capsys.readouterr().err.count("tmjax: error:") == 1
    RunDirectory.start(run, "b: 1\n", header(), overwrite=True).close()
    assert read_manifest(run)["format"] == FORMAT and Path(run / "recipe.yaml").read_text() == "b: 1\n"
