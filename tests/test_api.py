"""The Python interface of the README, and the rows contract between stores."""

import dataclasses

import numpy as np
import pytest

import tmjax
from tmjax.errors import NoTransferError, RowMismatchError


def test_the_readmes_lines_give_what_the_command_gives(texts, plain, llama_dir, qwen2_dir, tmp_path) -> None:
    target, source = tmjax.load_model(qwen2_dir), tmjax.load_model(llama_dir)
    calibration, test = (tmjax.read_texts(texts[name]) for name in ("calibration", "test"))
    activations = tmjax.extract_activations(target, source, calibration, tmp_path / "activations")
    alignment = tmjax.align(*activations, target.projections)
    fused = tmjax.fuse(alignment, target, source, alpha=0.05)
    assert tmjax.require_transfer(fused.table, allow_negligible=False) is None
    tmjax.export(fused.model, tmp_path / "merged")
    again = tmjax.load_model(tmp_path / "merged")
    scores = tmjax.evaluate(again, test)
    assert scores.bits_per_byte == pytest.approx(tmjax.evaluate(fused.model, test).bits_per_byte, rel=1e-6)
    assert 1.5 < scores.bits_per_byte < 2.5
    # The command captured the same activations.
    for side, held in zip(("target", "source"), activations, strict=True):
        np.testing.assert_allclose(held.site("q"), np.load(plain / f"activations/{side}/q.npy"), atol=1e-4)
    other = dataclasses.replace(
        activations[1].rows, start=activations[1].rows.start[::-1], end=activations[1].rows.end[::-1]
    )
    with pytest.raises(RowMismatchError, match="is another piece of text in the source"):
        tmjax.align(activations[0], dataclasses.replace(activations[1], rows=other), target.projections)
    with pytest.raises(NoTransferError):
        tmjax.require_transfer(tmjax.fuse(alignment, target, source, alpha=0.0).table, allow_negligible=False)


def test_names_are_there_whatever_was_imported_first() -> None:
    import tmjax.align.alignment
    import tmjax.evaluate.bits

    assert callable(tmjax.align) and callable(tmjax.evaluate) and callable(tmjax.fuse)
    assert tmjax.align.alignment.align.__name__ == "align"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tmjax.nothing
