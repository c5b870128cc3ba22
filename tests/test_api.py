"""The functions of `tmjax.api`: the README's lines, the command's defaults, and the rows contract between stores."""

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest

import tmjax
from tmjax import api
from tmjax.activations.extract import extract_activations
from tmjax.align.alignment import align as align_activations
from tmjax.errors import NoTransferError, RowMismatchError
from tmjax.recipes.merge import ActivationOptions, AlignmentOptions
from tmjax.transfer.update_table import require_transfer


@pytest.fixture(scope="module")
def models(qwen2_dir, llama_dir):
    """Target and source."""
    return api.load_model(qwen2_dir), api.load_model(llama_dir)


def test_align_fuse_export_evaluate(models, texts, tmp_path) -> None:
    target, source = models
    calibration, test = (api.read_texts(texts[name]) for name in ("calibration", "test"))
    alignment = api.align(target, source, calibration)
    fused = api.fuse(alignment, target, source, alpha=0.05)
    assert require_transfer(fused.table, allow_negligible=False) is None
    api.export(fused.model, tmp_path / "merged")
    scores = api.evaluate(api.load_model(tmp_path / "merged"), test)
    assert scores.bits_per_byte == pytest.approx(api.evaluate(fused.model, test).bits_per_byte, rel=1e-6)
    assert 1.5 < scores.bits_per_byte < 2.5
    with pytest.raises(NoTransferError):
        require_transfer(api.fuse(alignment, target, source, alpha=0.0).table, allow_negligible=False)


def test_activations_are_those_of_the_command(models, texts, plain, tmp_path) -> None:
    activations = extract_activations(*models, api.read_texts(texts["calibration"]), tmp_path / "activations")
    for side, recorded in zip(("target", "source"), activations, strict=True):
        np.testing.assert_allclose(recorded.site("q"), np.load(plain / f"activations/{side}/q.npy"), atol=1e-4)
    rows = activations[1].rows
    other = dataclasses.replace(rows, start=rows.start[::-1], end=rows.end[::-1])
    with pytest.raises(RowMismatchError, match="is another piece of text in the source"):
        align_activations(activations[0], dataclasses.replace(activations[1], rows=other), models[0].projections)


@pytest.mark.slow
def test_alignment_from_sums_is_that_from_activations(models, texts) -> None:
    few, options = api.read_texts(texts["calibration"]).first(4), AlignmentOptions(epsilon=0.1, max_iterations=20)
    kept, summed = (
        api.align(*models, few, options=options, activations=ActivationOptions(keep=keep, max_texts=3))
        for keep in (True, False)
    )
    assert kept.rows == summed.rows
    for role, plan in kept.layer_plans.items():
        np.testing.assert_allclose(summed.layer_plans[role].weights, plan.weights, atol=1e-2)


def test_merge_is_the_command(flags, plain, recipe_file, tmp_path) -> None:
    from tmjax.recipes.base import read_recipe

    inputs = dict(zip((flag.removeprefix("--") for flag in flags[::2]), flags[1::2], strict=True))
    model, manifest = api.merge(**read_recipe(Path(recipe_file)), **inputs, out=tmp_path / "run")
    command = api.load_model(plain / "merged")
    for path, value in command.params.items():
        np.testing.assert_array_equal(np.asarray(model.params[path]), np.asarray(value))
    assert manifest["evaluation"]["merged"]["bits_per_byte"] > 1


def test_names_of_the_package() -> None:
    assert {*tmjax.__all__} == {*api.__all__, "__version__"} - {"align", "evaluate"}
    assert all(getattr(tmjax, name) is getattr(api, name) for name in tmjax.__all__ if name != "__version__")
    # Packages, whatever was imported first.
    assert all(getattr(tmjax, name) is importlib.import_module(f"tmjax.{name}") for name in ("align", "evaluate"))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tmjax.nothing
