"""`tmjax compare`: paired intervals against a direct computation, what may be compared with what."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tmjax import cli
from tmjax.errors import InputError
from tmjax.evaluate.paired import Series, compare_paired


def series(values, denominator=None, **options) -> Series:
    values = np.asarray(values, float)
    names = tuple(map(str, range(len(values))))
    return Series(names, values, np.ones(len(values)) if denominator is None else denominator, **options)


def test_paired_intervals_are_those_of_resampled_documents():
    generator = np.random.default_rng(0)
    easy = generator.random(300)
    first, second = series(easy), series(easy + generator.normal(0.02, 0.01, 300))
    found = compare_paired({"a": {"t/acc": first}, "b": {"t/acc": second}}, draws=4000)["t/acc"]
    difference = found["results"]["b"]["difference"]
    drawn = generator.integers(300, size=(4000, 300))
    expected = np.quantile((second.numerator - first.numerator)[drawn].mean(1), [0.025, 0.975])
    np.testing.assert_allclose(difference["ci95"], expected, atol=3e-4)
    # Each model's own interval is far wider than that of the pairs.
    assert np.ptp(found["results"]["a"]["ci95"]) > 10 * np.ptp(difference["ci95"])
    assert found["results"]["b"]["verdict"] == "better"
    assert "difference" not in found["results"]["a"]


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        gain = generator.normal(0.3, 1, 80)
        pair = {"a": {"m": series(np.zeros(80))}, "b": {"m": series(gain)}}
        low, high = compare_paired(pair, draws=400, seed=trial)["m"]["results"]["b"]["difference"]["ci95"]
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_bits_per_byte_is_a_ratio_of_sums_and_lower_is_better():
    bits, size = np.asarray([10.0, 40.0, 6.0] * 30), np.asarray([5.0, 10.0, 2.0] * 30)
    results = {"a": {"b": series(bits, size, lower_is_better=True)}}
    results["c"] = {"b": series(bits * 0.9, size, lower_is_better=True)}
    found = compare_paired(results, draws=500)["b"]
    assert found["results"]["a"]["score"] == pytest.approx(bits.sum() / size.sum())
    assert found["results"]["c"]["verdict"] == "better"


def test_means_over_tasks_draw_documents_within_each():
    a = {"x/acc": series([0, 1] * 50), "y/acc": series([1] * 10), "x/f1": series([0.5] * 100)}
    b = {"x/acc": series([1, 1] * 50), "y/acc": series([0] * 10), "x/f1": series([0.5] * 100)}
    found = compare_paired({"a": a, "b": b}, draws=500)
    assert set(found) == {"x/acc", "y/acc", "x/f1", "mean/acc"}
    assert found["mean/acc"]["results"]["b"]["difference"]["value"] == pytest.approx(-0.25)
    assert found["x/f1"]["results"]["b"]["verdict"] == "not distinguishable"


def test_other_documents_are_not_compared():
    with pytest.raises(InputError, match="other documents"):
        compare_paired({"a": {"m": series([1, 2])}, "b": {"m": series([1, 2, 3])}})
    with pytest.raises(InputError, match="no measure in common"):
        compare_paired({"a": {"m": series([1, 2])}, "b": {"n": series([1, 2])}})


def fake_tasks(folder: Path, tokens: str, gold_log_p: list[float], hashes: list[str] | None = None) -> Path:
    """What `tmjax evaluate --out` writes, with chosen numbers."""
    (folder / "samples").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"tasks": {"tokens_sha256": tokens}}))
    lines = []
    for number, value in enumerate(gold_log_p):
        other = -3.0
        line = {"doc_id": number, "doc_hash": (hashes or ["h"] * 99)[number], "target": "1", "filter": "none"}
        line |= {"filtered_resps": [[other, False], [value, True]], "metrics": ["acc"], "acc": float(value > other)}
        lines.append(json.dumps(line) + "\n")
    (folder / "samples" / "quiz.jsonl").write_text("".join(lines))
    return folder


def test_log_likelihoods_are_compared_for_the_same_token_ids_only(tmp_path, capsys):
    one = fake_tasks(tmp_path / "one", "same", [-1.0, -5.0, -2.0] * 10)
    two = fake_tasks(tmp_path / "two", "same", [-0.5, -2.0, -2.0] * 10)
    three = fake_tasks(tmp_path / "three", "other", [-0.5, -2.0, -2.0] * 10)
    plot = tmp_path / "plot.png"
    assert cli.run(["compare", str(one), str(two), "--json", "--draws", "300", "--plot", str(plot)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["compare"]) == {"quiz/acc", "quiz/answer_log_likelihood"} and not found["notes"]
    held = found["compare"]["quiz/answer_log_likelihood"]["results"]
    assert held[str(two)]["difference"]["value"] == pytest.approx((0.5 + 3.0) / 3)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert cli.run(["compare", str(one), str(three), "--json", "--draws", "300"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["compare"]) == {"quiz/acc"} and "other token ids" in found["notes"][0]
    assert cli.run(["compare", str(one), str(two), str(three), "--draws", "300"]) == 0
    assert "quiz/acc" in capsys.readouterr().out


def test_arms_of_a_run_and_evaluated_folders(plain, flags, tmp_path, capsys):
    test, target = flags[flags.index("--test") + 1], flags[flags.index("--target") + 1]
    out = tmp_path / "target"
    assert cli.run(["evaluate", target, "--texts", test, "--out", str(out), "--mesh", "data=1", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)["evaluation"][target]
    assert cli.run(["compare", str(out), f"{plain}:target", str(plain), "--json", "--draws", "500"]) == 0
    held = json.loads(capsys.readouterr().out)["compare"]["bits_per_byte"]["results"]
    manifest = json.loads((plain / "manifest.json").read_text())["evaluation"]
    assert held[str(out)]["score"] == pytest.approx(scored["bits_per_byte"], rel=1e-14)  # sums in another order
    assert held[f"{plain}:target"]["difference"]["value"] == pytest.approx(0, abs=1e-6)
    assert held[str(plain)]["score"] == pytest.approx(manifest["merged"]["bits_per_byte"])
    assert math.isclose(
        held[str(plain)]["difference"]["value"],
        manifest["merged"]["bits_per_byte"] - manifest["target"]["bits_per_byte"],
        abs_tol=1e-6,
    )
    valid = flags[flags.index("--valid") + 1]
    assert cli.run(["evaluate", target, "--texts", valid, "--out", str(tmp_path / "v"), "--mesh", "data=1"]) == 0
    for names, told in (
        ([str(out), str(tmp_path / "v")], "other texts"),
        ([str(out), f"{plain}:none"], "has no arm none"),
        ([str(out), str(tmp_path / "nowhere")], "no folder of results"),
        ([str(out), str(out)], "named twice"),
        ([str(out)], "at least two"),
    ):
        capsys.readouterr()
        assert cli.run(["compare", *names]) == 2
        assert told in " ".join(capsys.readouterr().err.split())
