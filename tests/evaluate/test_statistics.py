"""Statistics of units are those of float64, whichever block of units a unit falls into."""

import numpy as np

from tmjax.align.statistics import BLOCK, statistics


def test_statistics_are_those_of_float64_across_blocks() -> None:
    generator = np.random.default_rng(0)
    units = 2 * BLOCK + 3
    # Means up to a thousand standard deviations away: float32 sums would lose what the deviation is made of.
    x = (generator.normal(size=(2, 301, units)) + generator.uniform(-1e3, 1e3, units)).astype(np.float32)
    constant = [0, BLOCK - 1, BLOCK, units - 1]
    x[1, :, constant] = 7.0
    found, wide = statistics(x), x.astype(np.float64)
    deviation = np.sqrt(np.mean((wide - wide.mean(axis=1, keepdims=True)) ** 2, axis=1))
    deviation[1, constant] = 0.0
    for name, truth in (
        ("mean", wide.mean(axis=1)),
        ("std", deviation),
        ("rms", np.sqrt(np.mean(wide**2, axis=1))),
        ("mean_abs", np.abs(wide).mean(axis=1)),
    ):
        value = getattr(found, name)
        assert value.shape == (2, units) and value.dtype == np.float32
        np.testing.assert_allclose(value, truth, rtol=1e-6)
    assert (found.std[1, constant] == 0).all()


def test_statistics_of_a_file_that_is_mapped(tmp_path) -> None:
    x = np.random.default_rng(1).normal(size=(3, 5, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = statistics(np.load(tmp_path / "x.npy", mmap_mode="r"))
    for name in ("mean", "std", "rms", "mean_abs"):
        np.testing.assert_array_equal(getattr(mapped, name), getattr(statistics(x), name))
