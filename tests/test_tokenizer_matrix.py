"""Eight kinds of tokenizers as source and as target, with padded vocabularies: merge, adapt and evaluate them all.

Every pair ends with finite numbers and untouched rows of padding, or is refused in one line for a true reason.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers import short_recipes, stored
from tokenizer_kinds import KINDS, write

from tmjax import cli
from tmjax.runs.manifest import read_manifest
from tmjax.teacher.probabilities import TeacherProbabilities
from tmjax.text.documents import read_texts
from tmjax.text.tokenizer import load_tokenizer
from tools.make_checkpoint import family_spec, make_checkpoint

SIZE, ROWS = 600, 640
#: Words of a text: as many for all, so that all kinds share their programs.
WORDS = 6
SHAPE = {"vocab": ROWS, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "max_positions": 512}
#: Each kind once as source and once as target. WordPiece drops spaces and case, so that it goes with itself alone.
CIRCLE = tuple(kind for kind in KINDS if kind != "wordpiece")
COMMANDS = ("merge", "adapt")
QUICK = [(a, b, "adapt") for a, b in zip(CIRCLE[::2], (*CIRCLE[1::2], CIRCLE[0]), strict=False)]
QUICK += [("wordpiece", "wordpiece", "adapt"), (CIRCLE[1], CIRCLE[2], "merge")]
#: Every pair with both commands; where all need to be quick, `adapt`, which does more, for every second pair of the
#: circle, so that each kind occurs, and `merge` for one.
CASES = [
    pytest.param(a, b, which, marks=() if (a, b, which) in QUICK else pytest.mark.slow)
    for which in COMMANDS
    for a in KINDS
    for b in KINDS
]


@pytest.fixture(scope="module")
def texts(repo, tmp_path_factory) -> dict[str, str]:
    """The beginnings of a few verses."""
    folder = tmp_path_factory.mktemp("texts")
    verses = read_texts(str(repo / "experiments/swahili/texts/swahili.calibration.jsonl")).texts
    begun = [" ".join(verse.split()[:WORDS]) for verse in verses if len(verse.split()) >= WORDS]
    for name, part in (("calibration", begun[:8]), ("valid", begun[100:104]), ("test", begun[200:204])):
        (folder / f"{name}.txt").write_text("\n".join(part) + "\n")
    return {name: str(folder / f"{name}.txt") for name in ("calibration", "valid", "test")}


@pytest.fixture(scope="module")
def models(repo, tmp_path_factory) -> dict[str, dict[str, Path]]:
    """Random models by side and kind: all sources of one shape, all targets of another, untied and of 16 bits."""
    verses = read_texts(str(repo / "experiments/swahili/texts/swahili.calibration.jsonl")).first(300).texts
    root = tmp_path_factory.mktemp("models")
    found: dict[str, dict[str, Path]] = {"source": {}, "target": {}}
    for name, kind in KINDS.items():
        folder = root / f"tokenizer-{name}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
        write(folder, kind(verses, SIZE))
        for side, family, hidden, dtype in (("source", "llama", 40, "float32"), ("target", "qwen2", 32, "bfloat16")):
            spec = family_spec(family, **SHAPE, hidden=hidden, mlp=2 * hidden, tied_embeddings=side == "source")
            place = root / f"{side}-{name}"
            made = {"dtype": dtype, "scale": 0.1, "seed": 0 if side == "source" else 1}
            found[side][name] = make_checkpoint(place, family, spec, tokenizer=folder, **made)
    return found


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, str]:
    return short_recipes(tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize(("source", "target", "command"), CASES)
def test_every_kind_with_every_kind(
    source, target, command, models, texts, recipes, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("tmjax.teacher.vocabulary_map.FEW", 1.0)  # whatever the share, it is said
    pair = {"source": models["source"][source], "target": models["target"][target]}
    out = tmp_path / "run"
    arguments = [command, recipes[command], *(part for name, path in pair.items() for part in (f"--{name}", str(path)))]
    arguments += ["--texts", texts["calibration"], "--valid", texts["valid"], "--test", texts["test"]]
    arguments += ["--out", str(out), *(["--mode", "combined"] if command == "adapt" else [])]
    code = cli.run(arguments)
    error = capsys.readouterr().err
    if (source == "wordpiece") != (target == "wordpiece"):
        changing = pair["source" if source == "wordpiece" else "target"]
        (line,) = error.splitlines()
        assert code == 2 and not out.exists()
        assert f"the tokenizer of {changing} reads ' " in line and "where the text has" in line
        assert ("preset barycentric" if command == "merge" else "mode guided") in line
        return
    assert code == 0, error
    manifest, known = read_manifest(out), load_tokenizer(pair["target"], ROWS).known(ROWS)
    assert known is not None and (~known).sum() >= ROWS - SIZE
    assert all(math.isfinite(arm["bits_per_byte"]) for arm in manifest["evaluation"].values())
    (name, facts), *others = manifest["teacher"].items()
    assert facts["positions"] > 0.4 * facts["of"] and not others
    share = f"only {facts['positions']:,} of the target's {facts['of']:,} positions ("
    assert (share in error) == (facts["positions"] < facts["of"])
    probabilities = TeacherProbabilities.load(out / "teacher" / f"{name}.npz")
    assert known[probabilities.ids].all() and (probabilities.weight.sum(axis=1) <= 1 + 1e-5).all()
    assert _padding(out / "merged", known) == _padding(pair["target"], known)
    assert _changed(out / "merged", pair["target"], known)
    assert cli.run(["evaluate", str(out / "merged"), "--texts", texts["test"], "--json"]) == 0
    held = json.loads(capsys.readouterr().out)["evaluation"][str(out / "merged")]["bits_per_byte"]
    arm = manifest["evaluation"]["merged" if command == "merge" else "adapted"]
    assert held == pytest.approx(arm["bits_per_byte"], rel=1e-5)


@pytest.mark.slow
def test_controls_of_padded_vocabularies(models, texts, recipes, tmp_path) -> None:
    """Each control runs through, and leaves the padding as it is."""
    target, out = models["target"]["added"], tmp_path / "run"
    arguments = ["merge", recipes["merge"], "--source", str(models["source"]["llama2"]), "--target", str(target)]
    arguments += ["--texts", texts["calibration"], "--valid", texts["valid"], "--test", texts["test"]]
    assert cli.run([*arguments, "--controls", "--out", str(out)]) == 0
    known = load_tokenizer(target, ROWS).known(ROWS)
    arms = sorted((out / "controls").iterdir())
    assert len(arms) == 4 and all(_padding(arm, known) == _padding(target, known) for arm in arms)
    assert all(math.isfinite(arm["bits_per_byte"]) for arm in read_manifest(out)["evaluation"].values())


def _tables(folder: Path) -> dict[str, np.ndarray]:
    held = {name: (shape, data) for name, (_, shape, data) in stored(folder).items()}
    return {
        name: np.frombuffer(data, np.uint8).reshape(ROWS, -1)
        for name, (shape, data) in held.items()
        if shape[0] == ROWS
    }


def _padding(folder: Path, known: np.ndarray) -> dict[str, bytes]:
    """The rows of both tables that are no tokens, bit for bit."""
    found = {name: table[~known].tobytes() for name, table in _tables(folder).items()}
    assert len(found) == 2
    return found


def _changed(folder: Path, before: Path, known: np.ndarray) -> bool:
    """Whether any token's row is another one."""
    old = _tables(before)
    return any((table[known] != old[name][known]).any() for name, table in _tables(folder).items())
