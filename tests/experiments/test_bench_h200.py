"""`experiments/bench/h200.py`: it runs every stage on whatever is there, and its figures are what they say they are."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmjax.align.alignment import solver_of
from tmjax.align.plans import solve_site
from tmjax.checkpoints.load import load_model
from tmjax.models.decoder import init_params
from tmjax.recipes.merge import AlignmentOptions
from tmjax.text.rows import Rows

BENCH = Path(__file__).resolve().parents[2] / "experiments/bench"


@pytest.fixture(scope="module")
def bench():
    """The benchmark's modules; its folder is on the path only meanwhile."""
    sys.path.insert(0, str(BENCH))
    try:
        import flops
        import h200
        import stages
        import synthetic

        yield {"flops": flops, "h200": h200, "stages": stages, "synthetic": synthetic}
    finally:
        sys.path.remove(str(BENCH))


#: Spans, and an epsilon at which few iterations are needed.
COMMON = ("--tiny", "--rows-per-text", "3", "--epsilon", "0.1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict, str, Path]:
    """All stages in a process of its own, on one CPU device; the folder holds the checkpoints and the report."""
    out = tmp_path_factory.mktemp("h200")
    (out / "scratch").mkdir()
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(BENCH.parents[1])}
    asked = ["--stages", "forward,export", "--peak-tflops", "0.5", "--folder", str(out / "scratch")]
    asked += ["--checkpoints", str(out / "models"), "--out", str(out / "report.json")]
    command = [sys.executable, str(BENCH / "h200.py"), *COMMON, *asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]), done.stdout, out


@pytest.mark.slow
def test_every_stage_runs_and_says_what_it_took(whole, bench) -> None:
    report, printed, out = whole
    assert json.loads((out / "report.json").read_text()) == report
    assert not list((out / "scratch").iterdir())
    sides = ("target", "source")
    expected = {f"{name} {side}" for name in ("forward", "extract") for side in sides}
    expected |= {"random weights", "write checkpoints", "load", "align", "fuse", "export"}
    assert set(report["stages"]) == expected
    for side in sides:
        entry, batch = report["stages"][f"extract {side}"], report["stages"][f"forward {side}"]
        assert entry["compiling"] == 0
        assert entry["tflops"] == pytest.approx(report["flops"][side] / entry["seconds"] / 1e12)
        assert entry["mfu"] == pytest.approx(entry["tflops"] / 0.5)
        size = batch["batch"][0]
        assert batch["model"]["tflops"] == pytest.approx(
            report["flops"][side] * size / report["texts"] / batch["model"]["seconds_per_batch"] / 1e12
        )
        # What was merged is a checkpoint like any other, and finite.
        model = load_model(out / "models" / side)
        assert model.spec == bench["synthetic"].shape_of(report[side])
        assert {str(value.dtype) for value in model.params.values()} == {"bfloat16"}
    held = report["stages"]["align"]["sites"]
    assert {site for site in held if "problems" not in held[site]} == {"gate", "up"}
    for site in held.keys() - {"gate", "up"}:
        assert held[site]["problems"] == held[site]["converged"] == 2 * 3
    # Each transported tensor has its target's norm, so alpha of it is alpha of that.
    assert report["stages"]["fuse"]["source_part"] == pytest.approx([0.05, 0.05], rel=1e-4)
    own = [entry["seconds"] for name, entry in report["stages"].items() if name[:3] in ("ext", "ali", "fus")]
    assert report["merge_seconds"] == pytest.approx(sum(own))
    assert "tiny-target <- tiny-source, 40 texts x 48 tokens, 120 rows (span), activations: keep" in printed


@pytest.mark.slow
def test_moments_solve_the_same_problems_as_kept_activations(whole, tmp_path, bench, capsys) -> None:
    arguments = [*COMMON, "--json", "--stages", "align", "--activations", "stream", "--folder", str(tmp_path)]
    assert bench["h200"].main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["activations"] == "stream" and report["rows"] == 3 * report["texts"]
    assert list(report["stages"]) == ["random weights", "extract", "align"]
    for site, kept in whole[0]["stages"]["align"]["sites"].items():
        if "problems" in kept:
            summed = report["stages"]["align"]["sites"][site]
            assert summed["problems"] == summed["converged"] == kept["problems"]
            assert abs(kept["max_iterations"] - summed["max_iterations"]) <= 2


def test_shapes_are_those_of_the_published_models(bench) -> None:
    family, shape_of = bench["synthetic"].FAMILY, bench["synthetic"].shape_of
    for name, published in (("llama-3.2-1b", 1_235_814_400), ("llama-3.1-8b", 8_030_261_248)):
        spec = shape_of(name)
        rows = [row for row in family.params(spec) if row.tied_to is None]
        assert sum(math.prod(row.stacked_shape(spec)) for row in rows) == published
        embeddings = spec.vocab * spec.hidden * (1 if spec.tied_embeddings else 2)
        norms = (2 * spec.layers + 1) * spec.hidden
        assert bench["flops"].matrix_parameters(family, spec) == published - embeddings - norms


def test_flops_are_those_that_xla_counts(bench) -> None:
    """One layer, since XLA counts the body of a loop once; it counts norms and softmax too, which are small here."""
    spec = bench["synthetic"].shape_of("1,512,1024,8,4,64,256")
    params = jax.eval_shape(lambda: init_params(spec, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((4, 128), jnp.int32)
    compiled = bench["stages"].final_states.lower(spec, params, ids, jnp.dtype("float32")).compile()
    counted = compiled.cost_analysis()["flops"]
    ours = bench["flops"].forward_flops(bench["synthetic"].FAMILY, spec, [128] * 4)
    assert ours <= counted <= 1.05 * ours


def test_random_texts_give_both_models_the_same_rows(bench) -> None:
    rows, documents = bench["synthetic"].random_texts(3, 10, 4, 50, seed=7)
    assert isinstance(rows, Rows) and rows.pooling == "span" and len(rows) == 12
    for document in documents:
        assert sorted(position for row in document.rows for position in row) == list(range(1, 10))
    assert [int(x) for x in rows.start[:4]] == [row[0] for row in documents[0].rows]
    again = bench["synthetic"].random_texts(3, 10, 4, 50, seed=7)
    rows.require_same(again[0])
    assert documents == again[1] != bench["synthetic"].random_texts(3, 10, 4, 50, seed=8)[1]
    whole, _ = bench["synthetic"].random_texts(3, 10, 1, 50, seed=7)
    assert whole.pooling == "sequence" and len(whole) == 3


def test_weights_are_random_and_of_the_stated_size(bench, tmp_path) -> None:
    from tmjax.sharding.mesh import Layout

    make, spec = bench["synthetic"].random_model, bench["synthetic"].shape_of("tiny-target")
    model, mesh = make(spec, 3, Layout(), tmp_path), make(spec, 3, Layout("fsdp=2,tensor=2"), tmp_path)
    for path, value in model.params.items():
        value = np.asarray(value, np.float32)
        if value.ndim - path.startswith("blocks.") == 1:
            assert (value == 1).all()
        else:
            assert value.std() == pytest.approx(0.02, rel=0.05) and abs(value.mean()) < 1e-3
            assert not np.array_equal(value[0], value[1])
    assert len(mesh.params["blocks.q.weight"].sharding.device_set) == 4
    assert mesh.params["blocks.q.weight"].addressable_shards[0].data.size * 4 == model.params["blocks.q.weight"].size


def test_what_fits_decides_what_is_kept(bench) -> None:
    kept = bench["h200"].kept
    needs = {"keep": {"activations (on disk)": 10.0}, "stream": {"moments": 10.0}}
    assert kept("auto", needs, {"disk": 20.0, "device": 1.0, "host": 1.0})
    assert not kept("auto", needs, {"disk": 5.0, "device": 20.0, "host": 1.0})
    assert not kept("auto", needs, {"disk": 5.0, "device": None, "host": 20.0})
    with pytest.raises(bench["h200"].InputError, match="neither"):
        kept("auto", needs, {"disk": 5.0, "device": 5.0, "host": 20.0})


def test_a_fixed_number_of_iterations_is_what_is_done(bench) -> None:
    generator = np.random.default_rng(0)
    x, y = (generator.normal(size=(2, 50, units)).astype(np.float32) for units in (12, 20))
    for iterations in (None, 3, 40):
        options = AlignmentOptions(epsilon=0.1, solver_options=bench["h200"].solver_options("float32", iterations))
        found = np.asarray(solve_site(x, y, solver_of(options)).iterations)
        assert (found == iterations).all() if iterations else len(set(found)) > 1


def test_peaks_go_by_the_name_of_the_device(bench) -> None:
    peak = bench["h200"].peak_of
    assert peak("NVIDIA H200", None) == peak("NVIDIA H100 80GB HBM3", None) == 989
    assert peak("NVIDIA H100 PCIe", None) == 756 and peak("NVIDIA A100-SXM4-80GB", None) == 312
    assert peak("TPU v4", None) == 275 and peak("TPU v5 lite", None) == 197
    assert peak("cpu", None) is None and peak("cpu", 0.3) == 0.3


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--stages", "align,bake"], "bake is not one of forward"),
        (["--source", "llama-900b"], "llama-900b"),
        (["--source", "2,64,128,3,2,16,256"], "3 query heads cannot share 2"),
        (["--dtype", "int8"], "int8 is neither"),
        (["--rows-per-text", "48"], "at most 47 rows"),
        (["--layer-pairs", "few"], "not one of all, coarse, band"),
        (["--activations", "both", "--stages", "align"], "not one of auto, keep, stream"),
    ],
)
def test_wrong_usage_is_one_line(bench, capsys, tmp_path, arguments, fragment) -> None:
    assert bench["h200"].main(["--tiny", "--folder", str(tmp_path), *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("h200: error:")]
    assert len(errors) == 1 and fragment in errors[0]
    assert not list(tmp_path.iterdir())
