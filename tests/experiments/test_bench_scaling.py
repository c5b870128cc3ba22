"""`experiments/bench/scaling.py`: sums of its formula grow as they must, exponents are those of its times."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[2] / "experiments/bench"
FACTORS, STAGES = ("texts", "layers", "width"), ("extraction", "alignment")


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[dict, str, Path]:
    """The script with tiny sizes, in a process of its own."""
    out = tmp_path_factory.mktemp("scaling")
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(BENCH.parents[1])}
    command = [sys.executable, str(BENCH / "scaling.py"), "--quick", "--repeats", "1", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads((out / "scaling.json").read_text()), done.stdout, out


def points(result: dict, factor: str) -> list[dict]:
    return sorted((p for p in result["points"] if p["factor"] in (factor, "base")), key=lambda p: p["times"])


@pytest.mark.slow
def test_each_sum_of_the_formula_grows_as_its_symbols_say(quick) -> None:
    base = quick[0]["points"][0]
    assert base["factor"] == "base"
    of = {factor: points(quick[0], factor)[1] for factor in FACTORS}

    def growth(factor: str, stage: str, term: str) -> float:
        return of[factor][stage]["terms"][term] / base[stage]["terms"][term]

    for term, exponent in (("costs", 2), ("iterations", 2), ("statistics", 1)):
        assert growth("layers", "alignment", term) == 2**exponent
        assert growth("width", "alignment", term) == 2**exponent
    rows = of["texts"]["rows"] / base["rows"]
    assert rows > 1.2
    assert growth("texts", "alignment", "costs") == growth("texts", "alignment", "statistics") == pytest.approx(rows)
    assert growth("texts", "alignment", "iterations") == 1
    assert growth("layers", "extraction", "products") == growth("layers", "extraction", "writing") == 2
    # Matrices grow with the square of the width; attention and averages, linear in it, are part of the rest.
    assert 2 < growth("width", "extraction", "products") < 4
    assert growth("width", "extraction", "writing") == 2
    assert growth("texts", "extraction", "writing") == pytest.approx(rows)
    assert growth("layers", "extraction", "tokenising") == growth("width", "extraction", "tokenising") == 1


@pytest.mark.slow
def test_predictions_start_at_what_the_base_took(quick) -> None:
    base = quick[0]["points"][0]
    for stage in STAGES:
        parts = base[stage]["predicted_parts"]
        assert base[stage]["predicted"] == pytest.approx(sum(parts.values()))
        # A part that is timed alone may be slower than inside, never faster than the rest allows.
        assert base[stage]["predicted"] >= base[stage]["fastest"] * 0.999
        rates = quick[0]["seconds_per_term"][stage]
        for point in quick[0]["points"]:
            terms = point[stage]["terms"]
            assert point[stage]["predicted"] == pytest.approx(sum(rates[name] * terms[name] for name in rates))


@pytest.mark.slow
def test_exponents_are_those_of_the_times(quick) -> None:
    result, printed, out = quick
    for factor in FACTORS:
        for stage in STAGES:
            own = points(result, factor)
            assert [p["times"] for p in own] == [1, 2]
            for name, key in (("measured", "fastest"), ("predicted", "predicted")):
                slope = np.log(own[1][stage][key] / own[0][stage][key]) / np.log(2)
                held = result["exponents"][factor][stage][name]
                assert [held["fitted"], held["last"]] == pytest.approx([slope, slope])
            assert f"| {stage} | {factor} |" in printed
    assert ElementTree.parse(out / "scaling.svg").getroot().tag.endswith("svg")
    assert (out / "scaling.svg").stat().st_size < 100_000


def test_a_power_law_has_its_exponent_and_a_bend_shows_in_the_last_doubling() -> None:
    sys.path.insert(0, str(BENCH))
    try:
        from scaling import exponents
    finally:
        sys.path.remove(str(BENCH))
    times = [1, 2, 4, 8]
    exact = exponents(times, [3.0 * n**1.7 for n in times])
    assert exact["fitted"] == pytest.approx(1.7) and exact["last"] == pytest.approx(1.7)
    bent = exponents(times, [5.0 + n**2 for n in times])
    assert bent["fitted"] < bent["last"] < 2
