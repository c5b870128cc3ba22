"""Streamed moments equal the statistics of all rows at once; paired blocks equal what `capture` stores."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmjax.activations.blocks import GROUP_BATCHES, _cut, paired_blocks
from tmjax.activations.capture import CaptureOptions, capture, pooled_forward
from tmjax.align.moments import Moments, correlations, merge, start, unit_statistics, update
from tmjax.align.statistics import Statistics, statistics
from tmjax.checkpoints.load import load_model
from tmjax.errors import InputError, NonFiniteError, RowMismatchError
from tmjax.ot.cost import correlation, standardise
from tmjax.sharding.mesh import Layout
from tmjax.text.buckets import bucket_length
from tmjax.text.documents import read_texts
from tmjax.text.rows import Rows, pair_rows
from tmjax.text.tokenizer import load_tokenizer

L, M, N, K = 3, 2, 5, 7


def _rows(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated activations of units with different means and scales; unit 1 of each model is constant."""
    random = np.random.default_rng(seed)
    common = random.standard_normal((count, 4))
    found = []
    for layers, units in ((L, N), (M, K)):
        x = common @ random.standard_normal((layers, 4, units)) + random.standard_normal((layers, count, units))
        x = x * random.uniform(0.1, 10, (layers, 1, units)) + random.uniform(-3, 3, (layers, 1, units))
        x[..., 1] = 0.7
        found.append(x.astype(np.float32))
    return found[0], found[1]


def _accumulate(x: np.ndarray, y: np.ndarray, ends: list[int], width: int) -> Moments:
    """Moments of consecutive blocks that end at `ends`, each padded to `width` rows with garbage under a mask of 0."""
    state = start(L, M, N, K)
    for first, end in zip([0, *ends], [*ends, x.shape[1]], strict=True):
        mask = np.arange(width) < end - first
        blocks = [np.full((a.shape[0], width, a.shape[2]), np.nan, np.float32) for a in (x, y)]
        for block, a in zip(blocks, (x, y), strict=True):
            block[:, mask] = a[:, first:end]
        state = update(state, *blocks, mask)
    return state


def _same_statistics(ours: Statistics, truth: Statistics) -> None:
    for name in ("mean", "std", "rms", "mean_abs"):
        ratio = np.abs(getattr(ours, name) - getattr(truth, name)) / np.where(truth.rms == 0, 1, truth.rms)
        assert ratio.max() < 1e-5, name


@pytest.mark.parametrize("ends", [[], [64, 128, 192], [1, 1, 40, 104, 150], [0, 3, 67, 131, 190]])
def test_blocks_of_any_sizes_equal_all_rows_at_once(ends) -> None:
    x, y = _rows(201)
    state = _accumulate(x, y, ends, 64 if ends else 256)
    assert int(state.count) == 201
    for centred in (True, False):
        zx, zy = standardise(x, centre=centred), standardise(y, centre=centred)
        truth = correlation(zx[:, None], zy[None])
        ours = correlations(state, centred=centred)
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, truth, atol=1e-5)
        assert bool((ours[:, :, 1] == 0).all()) == centred == bool((ours[..., 1] == 0).all())
    for ours, rows in zip(unit_statistics(state), (x, y), strict=True):
        _same_statistics(ours, statistics(rows))
        assert (ours.std[:, 1] == 0).all()


def test_merging_equals_accumulating() -> None:
    x, y = _rows(150)
    whole = _accumulate(x, y, [64, 128], 64)
    halves = [_accumulate(x[:, cut], y[:, cut], [30], 64) for cut in (slice(0, 60), slice(60, None))]
    for merged in (
        merge(*halves),
        merge(merge(start(L, M, N, K), halves[1]), halves[0]),
        merge(merge(halves[0], start(L, M, N, K)), halves[1]),
    ):
        assert int(merged.count) == 150
        for centred in (True, False):
            truth = correlations(whole, centred=centred)
            np.testing.assert_allclose(correlations(merged, centred=centred), truth, atol=1e-5)
        for ours, truth in zip(unit_statistics(merged), unit_statistics(whole), strict=True):
            _same_statistics(ours, truth)


def test_no_rows_and_wrong_shapes_are_errors() -> None:
    x, y = _rows(8)
    none = update(start(L, M, N, K), x, y, np.zeros(8))
    for state in (none, merge(none, start(L, M, N, K))):
        assert all(bool((leaf == 0).all()) for leaf in jax.tree.leaves(state))
        for question in (correlations, unit_statistics):
            with pytest.raises(InputError, match="no rows"):
                question(state)
    for blocks in ((y, x), (x[:2], y), (x, y[:, :5])):
        with pytest.raises(ValueError, match=r"for moments of 3 x 5, 2 x 7"):
            update(none, *blocks, np.ones(8))
    alone = update(none, x, y, np.arange(8) == 3)
    assert bool((correlations(alone) == 0).all())
    np.testing.assert_array_equal(unit_statistics(alone)[0].mean, x[:, 3])


def test_thousands_of_blocks_lose_nothing() -> None:
    """A mean of a thousand standard deviations, against float64; float32 running sums do not survive it."""
    random = np.random.default_rng(1)
    blocks, rows = 3000, 16
    state = start(1, 1, 3, 4)
    seen = []
    naive = [np.zeros(shape, np.float32) for shape in ((3,), (4,), (3,), (4,), (3, 4))]
    for _ in range(blocks):
        common = random.standard_normal((rows, 1))
        x = (1000 + 0.8 * common + 0.6 * random.standard_normal((rows, 3))).astype(np.float32)
        y = (-2000 + 1.6 * common + 1.2 * random.standard_normal((rows, 4))).astype(np.float32)
        seen.append(np.concatenate([x, y], 1))
        state = update(state, x[None], y[None], np.ones(rows, bool))
        for total, term in zip(naive, (x.sum(0), y.sum(0), (x * x).sum(0), (y * y).sum(0), x.T @ y), strict=True):
            total += term
    every = np.concatenate(seen).astype(np.float64)
    centred = every - every.mean(0)
    moments = centred.T @ centred
    truth = np.corrcoef(centred, rowvar=False)[:3, 3:]
    ours = np.asarray(correlations(state))[0, 0]
    np.testing.assert_allclose(ours, truth, atol=1e-5)
    np.testing.assert_allclose(unit_statistics(state)[0].std[0], every[:, :3].std(0), rtol=1e-5)
    np.testing.assert_allclose(unit_statistics(state)[1].mean[0], every[:, 3:].mean(0), rtol=1e-7)

    x, y, xx, yy, xy = (total.astype(np.float64) for total in naive)
    n = len(every)
    with np.errstate(invalid="ignore", divide="ignore"):
        lost = (xy - np.outer(x, y) / n) / np.sqrt(np.outer(xx - x * x / n, yy - y * y / n))
    assert not np.nanmax(np.abs(lost - truth)) < 0.1
    # `high` is the running sum without compensation: the compiler has not simplified the compensation away.
    error, plain = (
        np.abs(total - moments[:3, 3:]).max() / moments.max() for total in (state.cross.exact, state.cross.high)
    )
    assert error < 2e-7 and plain > 4 * error


def test_update_compiles_once_and_works_in_place() -> None:
    x, y = _rows(45)  # no other test has blocks of 9 rows
    state = start(L, M, N, K)
    before = update._cache_size()
    for i in range(5):
        old, state = state, update(state, x[:, 9 * i : 9 * i + 9], y[:, 9 * i : 9 * i + 9], np.arange(9) < 9 - i)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert update._cache_size() - before == 1


def test_memory_beside_the_state_is_one_pair_of_layers() -> None:
    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    state = jax.eval_shape(functools.partial(start, 8, 8, 128, 128))
    memory = update.lower(state, shape(8, 16, 128), shape(8, 16, 128), shape(16)).compile().memory_analysis()
    assert memory.alias_size_in_bytes > 2 * 4 * 64 * 128 * 128  # the accumulators are updated in place
    assert memory.temp_size_in_bytes < 2**20  # they are 8 MiB


@settings(max_examples=20)
@given(st.permutations(range(6)), st.integers(1, 10))
def test_the_order_of_blocks_does_not_matter(order: list[int], last: int) -> None:
    x, y = _rows(60, seed=last)
    states = []
    for blocks in (range(6), order):
        state = start(L, M, N, K)
        for i in blocks:
            mask = np.arange(10) < (last if i == 5 else 10)
            state = update(state, x[:, 10 * i : 10 * i + 10], y[:, 10 * i : 10 * i + 10], mask)
        states.append(state)
    for centred in (True, False):
        np.testing.assert_allclose(*(correlations(s, centred=centred) for s in states), atol=1e-5)
    for ours, truth in zip(*map(unit_statistics, states), strict=True):
        _same_statistics(ours, truth)


SOME = ("q", "mlp_hidden", "resid")


@pytest.fixture(scope="module")
def pair(qwen2_dir, llama_dir, repo):
    """Both bundled models as readers, and rows of a text set in which one document has none."""
    texts = read_texts(str(repo / "experiments/swahili/texts/swahili.valid.jsonl")).first(40)
    texts = type(texts)(texts.path, texts.ids, (*texts.texts[:5], " ", *texts.texts[6:]))
    models = [load_model(directory) for directory in (qwen2_dir, llama_dir)]
    tokenizers = [load_tokenizer(directory) for directory in (qwen2_dir, llama_dir)]
    rows, documents = pair_rows(texts, tokenizers, pooling="span", max_tokens=512)
    return rows, [(model.spec, model.params, read) for model, read in zip(models, documents, strict=True)]


@pytest.mark.parametrize("mesh", [None, pytest.param("data=4", marks=pytest.mark.slow)])
def test_paired_blocks_are_the_rows_that_capture_stores(pair, tmp_path, mesh) -> None:
    rows, readers = pair
    seen: list[tuple[int, int]] = []
    before = pooled_forward._cache_size()
    blocks = list(
        paired_blocks(
            *readers, rows, CaptureOptions(SOME, 96, layout=Layout(mesh)), block_rows=100,
            progress=lambda done, total: seen.append((done, total)),
        )
    )  # fmt: skip
    lengths = [[len(d.ids) for d in documents if d.rows] for _, _, documents in readers]
    compiled = pooled_forward._cache_size() - before
    assert compiled <= sum(len({bucket_length(n) for n in read}) for read in lengths)
    assert sum(lengths[0]) > 3 * GROUP_BATCHES * 96  # several groups
    assert [done for done, _ in seen] == list(range(1, seen[0][1] + 1)) and {total for _, total in seen} == {len(seen)}
    assert len(blocks) == -(-len(rows) // 100) and len(rows) % 100
    masks = np.concatenate([mask for *_, mask in blocks])
    np.testing.assert_array_equal(masks, np.arange(len(masks)) < len(rows))
    for side, (spec, params, documents) in enumerate(readers):
        directory = tmp_path / str(side)
        directory.mkdir()
        held = capture(spec, params, rows, documents, directory, CaptureOptions(SOME))
        for site in SOME:
            ours = np.concatenate([block[side][site] for block in blocks], axis=1)
            assert ours.dtype == np.float32 and not ours[:, ~masks].any()
            truth = held.site(site)
            np.testing.assert_allclose(ours[:, masks], truth, atol=2e-5 * np.abs(truth).max())


def test_streamed_moments_are_those_of_captured_activations(pair, tmp_path) -> None:
    rows, readers = pair
    spec, params, documents = readers[0]
    x = np.asarray(capture(spec, params, rows, documents, tmp_path, CaptureOptions(SOME[:1])).site("q"))
    state = None
    for ours, theirs, mask in paired_blocks(readers[0], readers[0], rows, CaptureOptions(SOME[:1]), block_rows=64):
        if state is None:
            state = start(len(ours["q"]), len(theirs["q"]), ours["q"].shape[2], theirs["q"].shape[2])
        state = update(state, ours["q"], theirs["q"], mask)
    z = standardise(x)
    np.testing.assert_allclose(correlations(state), correlation(z[:, None], z[None]), atol=2e-5)
    _same_statistics(unit_statistics(state)[0], statistics(x))


def test_only_one_group_and_one_block_are_held() -> None:
    alive: list[weakref.ref] = []

    def pieces():
        for _ in range(5):
            gc.collect()
            assert not [ref for ref in alive if ref() is not None]
            piece = [{"q": np.ones((1, 7, 2), np.float32)} for _ in range(2)]
            alive.extend(weakref.ref(values["q"]) for values in piece)
            yield piece
            del piece

    assert sum(int(mask.sum()) for *_, mask in _cut(pieces(), 4)) == 35


def test_documents_of_other_rows_and_overflow_are_errors(pair) -> None:
    rows, (target, source) = pair
    with pytest.raises(InputError, match="no site nowhere"):
        paired_blocks(target, source, rows, CaptureOptions(["nowhere"]))
    with pytest.raises(RowMismatchError, match="source has 39 documents, the rows name document 39"):
        paired_blocks(target, (*source[:2], source[2][:-1]), rows)
    fewer = Rows(rows.texts_sha256, "span", rows.document[1:], rows.start[1:], rows.end[1:])
    with pytest.raises(RowMismatchError, match="target document 0 has"):
        paired_blocks(target, source, fewer)
    spec, params, documents = target
    broken = (spec, {name: value * np.float32("inf") for name, value in params.items()}, documents)
    with pytest.raises(NonFiniteError, match="hold NaN or infinity"):
        next(paired_blocks(broken, source, rows, CaptureOptions(SOME, 256)))
