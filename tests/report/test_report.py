"""The report of a merge: what it computes against NumPy, and the page as a browser builds it."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tmjax import cli
from tmjax.align import storage as alignment_store
from tmjax.align.layer_plan import LayerPlan
from tmjax.align.site_plans import SitePlans
from tmjax.ot import DensePlan
from tmjax.report.heat_maps import by_layer
from tmjax.report.matching import concentration, head_shares, heaviest
from tmjax.report.tables import gain_sentence
from tmjax.runs.manifest import read_manifest

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser"))), None)
PARTS = ("gain", "evaluation", "arms", "layer_plan", "concentration", "heads", "coefficients", "coefficient_maps")
PARTS += ("update", "alignment", "samples", "stages")


def site(matrices: np.ndarray, index: np.ndarray) -> SitePlans:
    count = len(matrices)
    certificates = np.ones(count, np.int32), np.ones(count, bool), np.zeros(count, np.float32), np.zeros(count, bool)
    return SitePlans(DensePlan(jnp.asarray(matrices)), index, np.zeros(index.shape), index >= 0, *certificates)


@pytest.fixture(scope="module")
def built(plain):
    """An alignment of two layers with three: layer 0 is matched with source layer 2, layer 1 with source layer 1."""
    rng = np.random.default_rng(0)
    matching = np.zeros((4, 6), np.float32)
    matching[np.arange(4), [5, 0, 2, 4]] = 0.25
    spread = rng.random((4, 6)).astype(np.float32)
    ignored = rng.random((4, 6)).astype(np.float32)
    index = np.array([[2, -1, 0], [-1, 1, -1]])
    weights = np.array([[0.2, 0.0, 0.8], [0.6, 0.4, 0.0]], np.float32)  # the pair (1, 0) weighs more but is not held
    known = alignment_store.load(plain / "alignment")
    layers = {"q": LayerPlan(weights, weights, weights, weights, np.zeros(2, np.float32))}
    found = replace(known, plans={"q": site(np.stack([matching, spread, ignored]), index)}, layer_plans=layers)
    return found, matching, spread


def test_the_heaviest_held_pair_of_every_layer(built) -> None:
    assert heaviest(built[0], built[0].plans["q"]) == [(0, 2), (1, 1)]


def test_concentration_is_what_numpy_finds(built) -> None:
    alignment, matching, spread = built
    shares = np.concatenate([matching, spread])
    shares = shares / shares.sum(axis=1, keepdims=True)
    entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), axis=1)
    held = concentration(alignment)["q"]
    assert held["target_units"] == 4 and held["source_units"] == 6
    assert held["top_1"] == pytest.approx(shares.max(axis=1).mean(), rel=1e-5)
    assert held["top_8"] == pytest.approx(1.0, rel=1e-5)
    assert held["partners"] == pytest.approx(np.exp(entropy.mean()), rel=1e-4)


def test_heads_share_the_mass_of_their_units(built) -> None:
    alignment, _, spread = built
    (layer, other, block), (_, _, second) = head_shares(alignment, {"heads": 2}, {"heads": 3})["q"]
    assert (layer, other) == (0, 2)
    # Target head 0 holds units 0 and 1, matched with source units 5 (head 2) and 0 (head 0); head 1: 2 and 4.
    np.testing.assert_allclose(block, [[0.5, 0.0, 0.5], [0.0, 0.5, 0.5]], atol=1e-6)
    shares = spread / spread.sum(axis=1, keepdims=True)
    truth = [[shares[2 * h : 2 * h + 2, 2 * g : 2 * g + 2].sum() / 2 for g in range(3)] for h in range(2)]
    np.testing.assert_allclose(second, truth, rtol=1e-5)


def test_values_by_kind_and_layer() -> None:
    update = {"a.0.x.q.weight": {"alpha": 1.0}, "a.2.x.q.weight": {"alpha": 3.0}, "a.1.x.v.weight": {"alpha": 2.0}}
    kinds, values = by_layer({"update": update}, "alpha")
    assert kinds == ["x.q", "x.v"]
    np.testing.assert_array_equal(values, [[1, np.nan, 3], [np.nan, 2, np.nan]])


def told(run: Path) -> str:
    """The page without where the run lies, and without the stages that end it: a first page cannot have those rows."""
    page = (run / "report.html").read_text().replace(str(run), "RUN")
    return re.sub(r"<tr><td>(report|provenance)</td>.*?</tr>", "", page)


def test_made_again_from_the_run_alone(plain, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    (run / "report.html").unlink()
    shutil.rmtree(run / "activations")
    assert cli.run(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(run / "report.html")
    assert told(run) == told(plain)
    assert read_manifest(run) == read_manifest(plain) and not list(run.rglob("*.partial"))
    # A run of an earlier version has no samples: they are drawn anew, the same.
    (run / "samples.json").unlink()
    assert cli.run(["report", str(run)]) == 0
    assert told(run) == told(plain)


@pytest.mark.parametrize(("missing", "reason"), [("manifest.json", "not a run"), ("merged", "no finished merge")])
def test_what_is_no_merge_is_refused(plain, tmp_path, capsys, missing, reason) -> None:
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    (run / missing).unlink() if (run / missing).is_file() else shutil.rmtree(run / missing)
    assert cli.run(["report", str(run)]) == 2
    assert reason in capsys.readouterr().err
    assert (run / "report.html").read_text() == (plain / "report.html").read_text()


def test_target_and_merged_go_on_after_the_same_beginnings(plain, texts) -> None:
    entries = json.loads((plain / "samples.json").read_text())["samples"]
    test = [json.loads(line)["text"] for line in Path(texts["test"]).read_text().splitlines()]
    assert len(entries) == 4
    for entry in entries:
        assert any(text.startswith(entry["prompt"]) for text in test)
        assert entry["target"].strip() and entry["merged"].strip()


class Elements(HTMLParser):
    """Ids of a page, and everything it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.ids += [told["id"]] if told.get("id") else []
        self.loads += [told[key] for key in ("src", "href") if told.get(key)]


def test_the_page_has_all_parts_and_loads_nothing(plain) -> None:
    page = Elements()
    page.feed((plain / "report.html").read_text())
    assert set(PARTS) <= set(page.ids) and len(set(page.ids)) == len(page.ids)
    assert page.loads and all(told.startswith("data:image/png;base64,") for told in page.loads)


@pytest.mark.skipif(BROWSER is None, reason="no headless Chromium on this machine (Debian: chromium-headless-shell)")
def test_a_browser_shows_it(plain, tmp_path) -> None:
    """Every picture is decoded, every table has rows with the manifest's numbers, nothing reaches for the network."""
    page = tmp_path / "page.html"
    script = (
        "<script>addEventListener('load', () => { const out = document.createElement('pre'); out.id = 'seen';"
        "out.textContent = JSON.stringify({pictures: [...document.images].map(x => [x.id, x.naturalWidth]),"
        "rows: Object.fromEntries([...document.querySelectorAll('table')].map(x => [x.id, x.rows.length])),"
        "loaded: performance.getEntriesByType('resource').map(x => x.name).filter(x => !x.startsWith('data:')),"
        "cell: document.querySelector('#evaluation tbody tr:last-child td:nth-child(2)').textContent});"
        "document.body.append(out) })</script>"
    )
    page.write_text((plain / "report.html").read_text().replace("</body>", f"{script}</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)[1])
    pictures = dict(seen["pictures"])
    assert set(pictures) == {"arms", "layer_plan", "heads", "coefficients", "coefficient_maps"}
    assert all(width > 100 for width in pictures.values()) and seen["loaded"] == []
    manifest = read_manifest(plain)
    assert seen["cell"] == f"{manifest['evaluation']['merged']['bits_per_byte']:.4f}"
    assert seen["rows"]["update"] == 1 + len(manifest["update"]) and seen["rows"]["samples"] == 8
    assert seen["rows"]["concentration"] == seen["rows"]["alignment"] == 1 + len(manifest["alignment"])


@pytest.mark.parametrize(
    ("gain", "low", "high", "told"),
    [
        (0.0344, 0.0308, 0.038, "Gain due to the source: +0.0344 [+0.0308, +0.0380] bits/byte, 10.0% of the gap"),
        (
            -3e-6,
            -5e-6,
            1e-6,
            "Not distinguishable from the controls: gain due to the source +0.0000 [+0.0000, +0.0000]",
        ),
        (2e-6, 1e-6, 3e-6, "Nearly nothing came from the source: less than 0.0001 bits/byte, 10.0% of the gap"),
    ],
)
def test_what_came_from_the_source_is_said_in_a_sentence(gain, low, high, told):
    facts = {"bits_per_byte": gain, "ci95": [low, high], "fraction_of_gap": 0.1, "best_control": "control:shrink"}
    said = gain_sentence({"source_gain": facts})
    assert said.startswith(told) and said.endswith("against the best control (shrink).")
