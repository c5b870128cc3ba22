"""`tmjax plan`: programs, counts and advice; the hot programs compile for a TPU and a GPU that are not here."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers import SPEC

from tmjax import cli
from tmjax.cli.options import PairFlags
from tmjax.cli.verbs.doctor_command import _recipe_of
from tmjax.commands.plan import planning
from tmjax.commands.plan.adapt_programs import adapt_entries
from tmjax.commands.plan.communication import collectives
from tmjax.commands.plan.compiling import _needed, entries_of, read_models
from tmjax.commands.plan.counting import counted
from tmjax.commands.plan.machines import FIGURES, parse_topology, require_compiler
from tmjax.commands.plan.planned import Placement, Workload, device_bytes
from tmjax.errors import InputError
from tmjax.models.families import FAMILIES
from tmjax.recipes.adapt import AdaptRecipe, build_adapt_recipe
from tmjax.recipes.merge import Recipe
from tmjax.sharding.mesh import Layout
from tmjax.transfer.recipe import build_recipe

WORK = Workload(texts=64, tokens=100, valid=16)
#: Few layers, but wide ones: the compilers treat narrow matrices in other ways.
WIDE = {"layers": 2, "hidden": 512, "mlp": 1024, "heads": 8, "kv_heads": 4, "head_dim": 64, "vocab": 16384}


def missing(topology: str) -> bool:
    try:
        require_compiler(parse_topology(topology))
    except InputError:
        return True
    return False


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """Source and target of which only the config is there."""
    folder, found = tmp_path_factory.mktemp("plan"), []
    for name, size in (("source", WIDE | {"hidden": 1024, "mlp": 2048, "heads": 16}), ("target", WIDE)):
        spec = dataclasses.replace(SPEC, **size)
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(FAMILIES["llama"].config(spec) | {"dtype": "bfloat16"}))
        found.append(folder / name)
    return tuple(found)


def recipe_of(pair: tuple[Path, Path], mode: str | None = None):
    values = {"source": str(pair[0]), "target": str(pair[1]), "texts": "-", "out": "-", "dtype": "bfloat16"}
    return build_recipe(values) if mode is None else build_adapt_recipe(values | {"mode": mode})


def stub(monkeypatch, answers: dict[str, dict]) -> None:
    """Answers in place of compilers: by program, the listing under an empty name."""
    monkeypatch.setattr(planning, "require_compiler", lambda topology: None)
    monkeypatch.setattr(planning, "_answer", lambda question, program: answers["" if program is None else program[1]])


LISTED = {
    "mesh": {"data": 1, "fsdp": 4, "tensor": 1},
    "programs": [["a", "first"], ["a", "second"]],
    "host": {"memory": 1.0, "disk": 2.0},
}


def program(peak: float, live: float = 0.0) -> dict:
    return {
        "compiles": True,
        "calls": 3,
        "settings": {"activations.batch_tokens": 8192},
        "live_bytes": live,
        "flops": {"bfloat16": 197e12},
        "bytes": 1.0,
        "argument_bytes": 2**30,
        "compile_cpu_seconds": 1.0,
        "temporary_bytes": peak - 2**30,
        "peak_bytes": peak,
        "collectives": [{"kind": "all-gather", "bytes": 100, "turns": 4.0, "in_loop": True, "origin": ""}],
    }


@pytest.mark.parametrize(
    ("text", "devices", "wiring"),
    [
        ("v5e-16", 16, "v5e:4x4"),
        ("v5e-1", 1, "v5e:2x2"),
        ("v5p-8", 4, "v5p:2x2x1"),
        ("v6e:2x4", 8, "v6e:2x4"),
        ("v4-32", 16, "v4:2x2x4"),
        ("H100:8", 8, "1 x 1 x 8"),
    ],
)
def test_topologies_have_their_devices(text, devices, wiring):
    topology = parse_topology(text)
    assert (topology.devices, topology.wiring) == (devices, wiring)


@pytest.mark.parametrize("text", ["", "v3-8", "v5e-3", "v5p-7", "h100:9", "h100", "v5e"])
def test_unknown_topologies_are_one_line(text, capsys):
    assert cli.run(["plan", "--source", "x", "--target", "y", "--topology", text]) == 2
    assert capsys.readouterr().err.startswith("tmjax: error: topology")


def test_a_missing_compiler_is_one_line_that_says_what_to_install(monkeypatch, capsys, pair):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for topology, wanted in (("v5e-4", "libtpu"), ("h100:1", "jax-cuda12-plugin")):
        assert cli.run(["plan", "--source", str(pair[0]), "--target", str(pair[1]), "--topology", topology]) == 2
        error = capsys.readouterr().err
        assert wanted in error and "pip install 'tmjax[plan]'" in error and error.count("\n") == 1


@pytest.mark.parametrize("mode", [None, "combined", "lora"])
def test_every_program_takes_the_shapes_that_are_planned(pair, mode):
    recipe = recipe_of(pair, mode)
    place = Placement(Layout("fsdp=4"), jax.devices()[0])
    entries = entries_of(recipe, read_models(recipe), place, WORK)
    assert len({entry[:2] for entry in entries}) == len(entries) > 1
    for _, name, maker in entries:
        planned = maker()
        work = counted(planned.function.trace(*planned.arguments).jaxpr, place.layout.sizes, planned.turns)
        assert work.total > 0 and work.bytes > 0, name
        assert planned.calls >= 1 and device_bytes(planned.live) >= 0


def test_the_training_step_has_six_operations_per_parameter_and_token(pair):
    recipe = recipe_of(pair, "sft")
    sides, place = read_models(recipe), Placement(Layout(), jax.devices()[0])
    maker = next(maker for stage, name, maker in entries_of(recipe, sides, place, WORK) if name == "step")
    planned = maker()
    tokens = planned.settings["training.tokens_per_step"]
    flops = counted(planned.function.trace(*planned.arguments).jaxpr, place.layout.sizes).total
    embedding = WIDE["vocab"] * WIDE["hidden"]
    assert 1.0 <= flops / (6 * (sides["target"].parameters - embedding) * tokens) < 1.3


def test_bodies_of_loops_count_as_often_as_they_run():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    x, weights = jnp.zeros((8, 16)), jnp.zeros((5, 16, 16))
    work = counted(jax.make_jaxpr(layers)(x, weights), {"data": 2})
    assert work.total == 5 * 2 * 8 * 16 * 16 / 2


def test_collectives_in_a_loop_have_its_turns():
    layout = Layout("fsdp=8")
    weights = jax.device_put(np.ones((5, 16, 16), np.float32), layout.param_sharding("w", ("embed", "x"), (5, 16, 16)))
    x = layout.place_batch(np.ones((8, 16), np.float32))

    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    found = [each for each in collectives(jax.jit(layers).lower(x, weights).compile().as_text()) if each.in_loop]
    assert found and {each.turns for each in found} == {5}
    assert max(each.bytes for each in found) == 16 * 16 * 4


def test_what_does_not_fit_or_compile_is_said_with_advice(monkeypatch, capsys, pair):
    memory = FIGURES["v5e"].memory
    stub(monkeypatch, {"": LISTED, "first": program(memory), "second": {"compiles": False, "reason": "signal SIGILL"}})
    arguments = ["plan", "--source", str(pair[0]), "--target", str(pair[1]), "--topology", "v5e-4"]
    assert cli.run([*arguments, "--json"]) == 2
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    first, second = report["programs"]
    assert not report["fits"] and not first["fits"] and first["compiles"]
    assert any("activations.batch_tokens at most" in advice for advice in first["advice"])
    assert first["bound"] == "compute" and first["stage_seconds"] == pytest.approx(3.0)
    assert not second["compiles"] and "2 of 2 programs" in captured.err
    assert cli.run(arguments) == 2
    assert "does not compile: signal SIGILL" in capsys.readouterr().out


def test_what_fits_ends_well(monkeypatch, capsys, pair):
    stub(monkeypatch, {"": LISTED, "first": program(2**31), "second": program(2**31, live=2**30)})
    assert cli.run(["plan", "--source", str(pair[0]), "--target", str(pair[1]), "--topology", "v5e-4"]) == 0
    assert "Everything compiles and fits." in capsys.readouterr().out


def test_a_compiler_that_dies_is_a_row(monkeypatch, pair):
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    run = planning.subprocess.run
    monkeypatch.setattr(planning.subprocess, "run", lambda command, **rest: run([command[0], "-c", script], **rest))
    question = planning.Question(recipe_of(pair), parse_topology("v5e-4"), WORK)
    assert "SIGKILL" in planning._answer(question, ["evaluation", "scoring"])["reason"]


def test_a_recipe_of_an_adaptation_is_planned_too(monkeypatch, capsys, pair, tmp_path):
    stub(monkeypatch, {"": LISTED, "first": program(2**31), "second": program(2**31)})
    file = tmp_path / "adapt.yaml"
    file.write_text(yaml.safe_dump({"source": str(pair[0]), "target": str(pair[1]), "mode": "combined"}))
    assert cli.run(["plan", str(file), "--topology", "v5e-4", "--text-tokens", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["work"]["tokens"] == 64


#: Stage and name of programs that take most of a run's time, by command.
HOT = [
    (None, "activations:source", "capture"),
    (None, "alignment", "mlp_hidden"),
    (None, "generation", "32 tokens"),
    (None, "teacher probabilities", "texts"),
    (None, "predictions", "sums of given texts"),
    (None, "predictions", "solve blocks.down.weight"),
    (None, "evaluation", "scoring"),
    ("combined", "training", "step"),
]


#: A compiler takes 5 to 60 s for each: these few are for `make test`, the others are slow.
QUICK = [("h100:8", HOT[0]), ("h100:8", HOT[-1]), ("v5e-4", HOT[2])]
CASES = [(topology, hot) for topology in ("h100:8", "v5e-4", "v5e-16") for hot in HOT]


@pytest.mark.parametrize(
    ("topology", "mode", "stage", "name"),
    [pytest.param(at, *hot, marks=() if (at, hot) in QUICK else pytest.mark.slow) for at, hot in CASES],
)
def test_hot_programs_compile(topology, mode, stage, name, pair):
    if missing(topology):
        pytest.skip(f"the compiler for {topology} is not installed (extra plan)")
    question = planning.Question(recipe_of(pair, mode), parse_topology(topology), WORK)
    facts = planning._answer(question, [stage, name])
    assert facts.get("compiles"), facts
    assert planning._judged(facts, question.topology.figures, {"data": 1, "fsdp": 4, "tensor": 1})["fits"]
    assert facts["collectives"] is None or facts["collectives"] or stage in ("alignment",)


def test_what_a_compiler_refuses_says_what_it_needs():
    told = "Ran out of memory on HBM, the total memory required for HLO temporaries (24.84G) exceeds available HBM"
    assert _needed(told) == 24.84 * 2**30
    assert _needed("Used 18.20G of 15.75G hbm") == 18.20 * 2**30
    assert _needed("INTERNAL: no") is None


def test_a_recipe_without_a_mode_is_an_adaptation_by_its_keys(tmp_path) -> None:
    file = tmp_path / "adapt.yaml"
    file.write_text("source: s\ntarget: t\ntraining: {steps: 3}\n")
    assert isinstance(_recipe_of(PairFlags(recipe=file), None), AdaptRecipe)
    file.write_text("source: s\ntarget: t\npreset: quick\n")
    assert isinstance(_recipe_of(PairFlags(recipe=file), None), Recipe)


def test_a_budget_of_time_is_refused() -> None:
    values = {"source": "s", "target": "t", "texts": "-", "out": "-", "valid": "v"}
    with pytest.raises(InputError, match="plan with tokens"):
        next(adapt_entries(build_adapt_recipe(values | {"budget": "5m"}), {}, None, None))
