"""`tmjax sweep`: the same numbers as one setting after the other, one compilation, resuming, failures, the command."""

import csv
import importlib.util
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FORWARDS, alone_nll, forwards, texts_that_begin_alike

from tmjax import cli
from tmjax.activations import store
from tmjax.align.alignment import align
from tmjax.checkpoints.load import load_model
from tmjax.commands.sweep import run as pipeline_sweep
from tmjax.commands.sweep import score
from tmjax.commands.sweep.grid import coefficients_of, recipe_of
from tmjax.commands.sweep.results import read_csv
from tmjax.commands.sweep.score import SettingsScorer
from tmjax.errors import InputError
from tmjax.evaluate import packing
from tmjax.evaluate.bits import Scorer
from tmjax.evaluate.packing import pack, packed_nll, text_lengths
from tmjax.models.decoder import init_params
from tmjax.recipes.base import read_recipe
from tmjax.report.sweep_page import marginals, plot_sweep
from tmjax.runs.run_files import split
from tmjax.sharding.mesh import Layout
from tmjax.text.documents import read_texts
from tmjax.text.tokenizer import load_tokenizer
from tmjax.transfer.operator import read_chain
from tmjax.transfer.operators.transport import transport_model
from tmjax.transfer.projections import fuse_params, projection_contribution
from tmjax.transfer.recipe import build_recipe

GRID = [
    *("--grid", "alpha=0:0.1:0.05"),
    *("--grid", "beta.mlp=-0.1,tied"),
    *("--grid", "transport.mask_top_k=null,8"),
    *("--grid", "transport.bias=transported,keep_mean,none"),
    *("--grid", "epsilon=0.05,0.1"),
]


def _run(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def swept(small_flags, recipe_file, tmp_path_factory) -> Path:
    """72 settings of everything that is a number or decides a transport."""
    out = tmp_path_factory.mktemp("sweep") / "run"
    assert cli.run(["sweep", recipe_file, *small_flags, "--out", str(out), *GRID, "--write-best"]) == 0
    return out


@pytest.fixture(scope="module")
def models(small_flags):
    return load_model(small_flags[3]), load_model(small_flags[1])


def _activations(out: Path):
    held = {path.parent.name: path for path in out.glob("shared/*/activations/*/*.json")}
    folders = {path.parent.name: path.parent for path in held.values()}
    return store.read(folders["target"]), store.read(folders["source"])


def _plain(models, recipe, alignment, setting, texts) -> float:
    target, source = models
    options = read_chain(recipe.operators)[0].options
    moved = transport_model(alignment, target.rows, target.params, source.rows, source.params, options)
    pairs = coefficients_of(recipe, setting, tuple(moved))
    fused = fuse_params(target.rows, target.params, moved, pairs, bias_rule=options.bias)
    return Scorer(target.spec, load_tokenizer(target.directory), read_texts(texts))(fused).bits_per_byte


def test_every_number_is_that_of_the_plain_way(swept, models, texts) -> None:
    """Plans, transport, fusion and score of single settings, made anew from the activations."""
    rows = read_csv(swept / "results.csv")
    base = build_recipe(read_recipe(swept / "recipe.yaml"))
    target, source = _activations(swept)
    chosen = np.random.default_rng(0).choice(len(rows), 8, replace=False)
    for row in map(rows.__getitem__, chosen):
        setting = {key: row[key] for key in ("alpha", "beta.mlp", "transport.mask_top_k", "transport.bias", "epsilon")}
        recipe = recipe_of(base, setting)
        options = read_chain(recipe.operators)[0].options
        assert recipe.alignment.epsilon == row["epsilon"] and options.bias == row["transport.bias"]
        alignment = align(target, source, models[0].projections, recipe.alignment)
        assert row["bits_per_byte"] == pytest.approx(
            _plain(models, recipe, alignment, setting, texts["valid"]), rel=1e-5
        )
    # What is swept does something.
    for key in ("alpha", "beta.mlp", "transport.mask_top_k", "transport.bias", "epsilon"):
        assert len({best for _, best, _ in marginals(rows, key)} | {mean for *_, mean in marginals(rows, key)}) > 2


def test_what_a_sweep_writes(swept, texts, capsys) -> None:
    manifest = json.loads((swept / "manifest.json").read_text())
    facts = manifest["sweep"]
    assert split(swept, manifest)[1] == []
    assert facts["settings"] == 72 and facts["failed"] == 0 and facts["groups"] == 12
    # One program for each bias rule; masks, plans and coefficients are numbers to it.
    assert facts["compilations"] == 3 and manifest["sweep"]["test_compilations"] == 1
    names = [name.split(":")[0] for name in manifest["stages"]]
    assert names.count("activations") == 2 and names.count("alignment") == 2
    assert len(list((swept / "settings").glob("*.json"))) == 12 and not list(swept.rglob("*.partial"))
    rows = list(csv.DictReader((swept / "results.csv").read_text().splitlines()))
    assert len(rows) == 72 and [row["setting"] for row in rows] == [str(n) for n in range(72)]
    assert {row["status"] for row in rows} == {"done"} and {row["seed"] for row in rows} == {"0"}
    assert all(float(row["seconds"]) > 0 for row in rows)
    least = min(rows, key=lambda row: float(row["bits_per_byte"]))
    assert facts["best"]["setting"] == int(least["setting"])
    assert facts["best"]["valid_bits_per_byte"] == float(least["bits_per_byte"])
    assert set(manifest["evaluation"]) == {"target", "best"} and len(manifest["update"]) == 14
    page = (swept / "sweep.html").read_text()
    assert "data:image/png" in page and "http" not in page.split("<body>")[1] and "transport.mask_top_k" in page
    code, printed, _ = _run(capsys, "evaluate", swept / "best", "--texts", texts["test"], "--json")
    written = next(iter(json.loads(printed)["evaluation"].values()))
    assert code == 0 and written["bits_per_byte"] == pytest.approx(
        manifest["evaluation"]["best"]["bits_per_byte"], rel=1e-6
    )


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_parquet_holds_the_same_table(swept) -> None:
    import pyarrow.parquet

    held = pyarrow.parquet.read_table(swept / "results.parquet").to_pylist()
    rows = read_csv(swept / "results.csv")
    assert [row["bits_per_byte"] for row in held] == [row["bits_per_byte"] for row in rows]
    assert [row["transport.mask_top_k"] for row in held] == [row["transport.mask_top_k"] for row in rows]


@pytest.fixture(scope="module")
def transported(swept, models):
    target, source = models
    recipe = build_recipe(read_recipe(swept / "recipe.yaml"))
    alignment = align(*_activations(swept), target.projections, recipe.alignment)
    options = read_chain(recipe.operators)[0].options
    items = transport_model(alignment, target.rows, target.params, source.rows, source.params, options)
    return projection_contribution(target, options, items)


@pytest.mark.parametrize("mesh", ["data=1", pytest.param("data=8", marks=pytest.mark.slow), "data=2,fsdp=2,tensor=2"])
def test_devices_do_not_change_scores(transported, models, texts, small_flags, mesh: str) -> None:
    """Random coefficients of every projection, on one device, on eight, on meshes that split the model too."""
    layout = Layout(mesh)
    target = load_model(small_flags[3], placement=layout.place)
    tokenizer, valid = load_tokenizer(target.directory), read_texts(texts["valid"])
    scorer = SettingsScorer(target, tokenizer, valid, max_settings=11, layout=layout)
    generator = np.random.default_rng(3)
    settings = [{role: tuple(generator.uniform(-0.1, 0.1, 2)) for role in transported.items} for _ in range(11)]
    placed, found = scorer.place([transported]), []
    for start in range(0, len(settings), scorer.batch):
        found.append(scorer(placed, settings[start : start + scorer.batch]))
    one = Scorer(models[0].spec, tokenizer, valid)
    for nll, pairs in zip(np.concatenate(found), settings, strict=True):
        expected = one(fuse_params(target.rows, models[0].params, transported.items, pairs)).nll
        np.testing.assert_allclose(nll, expected, rtol=2e-6)
    assert scorer.compilations == 1


@pytest.mark.parametrize(("name", "chunk_tokens"), [("llama", 10**6), *forwards(150, "llama", "windows")])
def test_packed_texts_score_as_alone(name: str, chunk_tokens: int, monkeypatch) -> None:
    spec = FORWARDS[name]
    if name != "llama":  # logits of a few nodes at a time, the last of which are padding
        monkeypatch.setattr(packing, "LOGIT_ENTRIES", 1)
        monkeypatch.setattr(packing, "LOGIT_NODES", 37)
    generator = np.random.default_rng(0)
    params = {
        path: value + 0.3 * generator.normal(size=value.shape).astype(np.float32)
        for path, value in init_params(spec, jax.random.key(0)).items()
    }
    texts = texts_that_begin_alike(spec, generator, spec.max_positions)
    chunks = pack(spec, texts, chunk_tokens=chunk_tokens)
    assert chunks.packed.ids.shape[0] == (1 if chunk_tokens == 10**6 else round(sum(len(t) - 1 for t in texts) / 150))
    found = jax.lax.map(lambda chunk: packed_nll(spec, params, chunk, jnp.float32), chunks.packed)
    found = chunks.sums(np.asarray(found), len(texts))
    for text, value in zip(texts, found, strict=True):
        assert value == pytest.approx(alone_nll(spec, params, text), rel=2e-5)
    if chunk_tokens == 10**6:
        begun = {tuple(text[:n]) for text in texts for n in range(1, len(text))}
        assert chunks.packed.ids.shape[1] == -(-len(begun) // 8) * 8, "every beginning is computed once"


def test_padded_lengths_are_the_best_of_their_number() -> None:
    tokens = np.random.default_rng(1).integers(1, 60, 40)
    rounded = sorted({-(-n // 8) * 8 for n in tokens})

    def cost(lengths: tuple[int, ...]) -> int:
        return sum(min(length for length in lengths if length >= n) ** 2 for n in tokens)

    least = min(cost((*some, rounded[-1])) for some in itertools.combinations(rounded[:-1], 2))
    assert cost(tuple(text_lengths(tokens.tolist(), 3))) == least
    assert text_lengths([100_000, 3], 6)[-1] >= 100_000


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_at_the_next_batch(flags, recipe_file, tmp_path, monkeypatch, capsys) -> None:
    """Interrupted after its first batch; afterwards only the other batches are scored, and the table is the same."""
    monkeypatch.setattr(score, "BATCH_OPERATIONS", 0)
    grid = ["--grid", "alpha=0:0.15:0.01", "--grid", "beta=-0.1,0"]
    arguments = ["sweep", recipe_file, *flags, *grid, "--mesh", "data=8", "--json", "--out"]
    assert _run(capsys, *arguments, tmp_path / "whole")[0] == 0
    kept = pipeline_sweep.Sweep._score
    calls = []

    def counted(self, *given):
        if len(calls) == 1 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        calls.append(given[0])
        return kept(self, *given)

    interrupted: list[bool] = []
    monkeypatch.setattr(pipeline_sweep.Sweep, "_score", counted)
    code, printed, error = _run(capsys, *arguments, tmp_path / "run")
    assert code == 130 and printed == "" and "resumes" in error
    assert not (tmp_path / "run/results.csv").exists()
    code, printed, _ = _run(capsys, *arguments, tmp_path / "run")
    assert code == 0 and len(calls) == 4 and len(set(calls)) == 4, "32 settings in batches of 8, each scored once"
    manifest = json.loads(printed)
    assert {name.split(":")[0] for name, stage in manifest["stages"].items() if stage["reused"]} == {
        "activations",
        "alignment",
    }
    bits = [[row["bits_per_byte"] for row in read_csv(tmp_path / name / "results.csv")] for name in ("run", "whole")]
    assert bits[0] == bits[1]
    # Once finished nothing is done again, and another sweep does not overwrite it unasked.
    code, printed, _ = _run(capsys, *arguments, tmp_path / "run")
    assert code == 0 and len(calls) == 4 and all(stage["reused"] for stage in json.loads(printed)["stages"].values())
    assert json.loads(printed)["sweep"] == manifest["sweep"]
    code, _, error = _run(capsys, *arguments, tmp_path / "run", "--grid", "seed=1,2")
    assert code == 2 and "--overwrite" in error


@pytest.mark.slow
def test_a_killed_sweep_resumes(flags, recipe_file, tmp_path, capsys) -> None:
    """Killed in a process of its own after its first batch; what is finished is kept, the table is whole."""
    grid = ["--grid", "alpha=0:0.99:0.01", "--grid", "beta=-0.1:0.1:0.05"]
    arguments = ["sweep", recipe_file, *flags, *grid, "--out", str(tmp_path / "run"), "--json"]
    process = subprocess.Popen([sys.executable, "-m", "tmjax.cli", *arguments], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not (held := list((tmp_path / "run/settings").glob("*.json"))):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "run/results.csv").exists()
    before = {file.name: file.stat().st_mtime_ns for file in held}
    code, printed, _ = _run(capsys, *arguments)
    assert code == 0 and json.loads(printed)["sweep"]["settings"] == 500
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run/settings").glob("*.json")}
    assert len(after) > len(before) and after.items() >= before.items()
    rows = read_csv(tmp_path / "run/results.csv")
    assert len({(row["alpha"], row["beta"]) for row in rows}) == 500 and all(row["status"] == "done" for row in rows)
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_a_setting_that_fails_is_a_row(small_flags, recipe_file, tmp_path, capsys) -> None:
    """Exact matchings need models of equal widths; coefficients beyond float32 give no numbers."""
    out = tmp_path / "run"
    grid = ["--grid", "solver=scaling,assignment", "--grid", "alpha=0,0.05", "--grid", "beta=-0.05,3e38"]
    code, printed, _ = _run(capsys, "sweep", recipe_file, *small_flags, *grid, "--out", out, "--json")
    assert code == 0
    rows = read_csv(out / "results.csv")
    failed = [row for row in rows if row["status"] == "failed"]
    assert json.loads(printed)["sweep"]["failed"] == len(failed) == 6
    assert all(row["bits_per_byte"] is None and row["reason"] for row in failed)
    assert all(row["status"] == "failed" for row in rows if row["solver"] == "assignment" or row["beta"] == 3e38)
    assert "NaN" in next(row["reason"] for row in rows if row["beta"] == 3e38 and row["solver"] == "scaling")
    assert "assignment" in next(row["reason"] for row in rows if row["solver"] == "assignment")
    assert "assignment" in (out / "sweep.html").read_text()
    code, _, error = _run(
        capsys,
        "sweep",
        recipe_file,
        *small_flags,
        "--grid",
        "alpha=0.1",
        "--grid",
        "solver=assignment",
        "--out",
        tmp_path / "x",
    )
    assert code == 2 and "all 1 settings failed" in error and error.count("tmjax: error") == 1


def test_draws_repeat_and_equal_settings_are_scored_once(small_flags, recipe_file, tmp_path, capsys) -> None:
    tables = []
    for name in ("a", "b"):
        grid = ["--random", 6, "--seed", 5, "--grid", "alpha=0..0.2", "--grid", "beta=tied,0", "--grid", "seed=1,2"]
        code, printed, _ = _run(capsys, "sweep", recipe_file, *small_flags, *grid, "--out", tmp_path / name, "--json")
        facts = json.loads(printed)["sweep"]
        assert code == 0 and facts["groups"] == 1 and facts["random"] == 6
        tables.append(
            [
                {k: row[k] for k in ("alpha", "beta", "seed", "bits_per_byte")}
                for row in read_csv(tmp_path / name / "results.csv")
            ]
        )
    assert tables[0] == tables[1] and len({row["alpha"] for row in tables[0]}) == 6
    assert {row["seed"] for row in tables[0]} == {1, 2}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "nothing to sweep"),
        (["--grid", "speed=1,2"], "speed is not a key of the recipe"),
        (["--grid", "alpha=0.3:0:0.1"], "holds no value"),
        (["--grid", "alpha=0,2"], "alpha=2: recipe: alpha"),
        (["--grid", "solver=magic", "--alpha", "0.1"], "magic"),
        (["--grid", "epsilon=0.1,0.2"], "sweep it"),
        (["--grid", "alpha=0:1:0.001", "--grid", "beta=0:1:0.001"], "1002001 settings; at most 100000"),
        (["--grid", "alpha=0.1", "--random", "0"], "--random"),
        (["--grid", "alpha=0..1"], "give --random N"),
    ],
)
def test_bad_sweeps_are_one_line_before_any_work(flags, tmp_path, capsys, extra, message) -> None:
    code, printed, error = _run(capsys, "sweep", *flags, *extra, "--out", tmp_path / "run")
    assert code == 2 and printed == "" and message in error and not (tmp_path / "run").exists()
    assert error.count("\n") == 1 and error.startswith("tmjax: error: ")


def test_validation_texts_are_needed(flags, tmp_path, capsys) -> None:
    at = flags.index("--valid")
    given = [*flags[:at], *flags[at + 2 :], "--grid", "alpha=0.1", "--out", tmp_path / "run"]
    code, _, error = _run(capsys, "sweep", *given)
    assert code == 2 and "--valid" in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("keys", [["alpha"], ["alpha", "beta"], ["alpha", "solver"], ["alpha", "beta", "solver"]])
def test_plots_of_any_number_of_keys(keys: list[str]) -> None:
    values = {"alpha": [0, 0.1, 0.2], "beta": [-0.1, 0, 0.1], "solver": ["scaling", "ridge", "greedy"]}
    rows = []
    for number in range(27):
        setting = {key: values[key][number // 3**place % 3] for place, key in enumerate(keys)}
        bits = None if number == 4 else 2.0 + 0.01 * number
        rows.append({"setting": number, **setting, "bits_per_byte": bits, "seconds": 0.1, "status": "done"})
    assert plot_sweep(rows)[:8] == b"\x89PNG\r\n\x1a\n"
    assert [value for value, *_ in marginals(rows, keys[0])] == sorted(values[keys[0]])
    assert marginals(rows, keys[0])[0][1] == 2.0


def test_scores_need_valid_input(models, texts) -> None:
    with pytest.raises(InputError, match="at least 2 tokens"):
        SettingsScorer(
            models[0],
            load_tokenizer(models[0].directory),
            read_texts(texts["valid"]),
            max_settings=1,
            max_tokens=1,
        )
