"""Source features on disk: the used layers alone, moments in blocks, reads of one process's rows."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import SPEC

from tmjax.activations import store
from tmjax.activations.capture import CaptureOptions, capture
from tmjax.activations.store import Activations
from tmjax.errors import InputError
from tmjax.models.decoder import init_params
from tmjax.models.families import FAMILIES
from tmjax.sharding.mesh import Layout
from tmjax.teacher.span_features import SITE, read_out_metric
from tmjax.text.rows import Rows, TokenisedDocument
from tmjax.train import guidance
from tmjax.train.data import split
from tmjax.train.guidance import SourceFeatures, moments_of
from tmjax.train.modes import map_sharding, shardings_of

LENGTHS, LAYERS = (9, 5, 7), [0, 2, 2]
DOCUMENTS = [TokenisedDocument(list(range(1, length + 1)), [[at] for at in range(1, length, 2)]) for length in LENGTHS]
COUNTS = [len(document.rows) for document in DOCUMENTS]


@pytest.fixture(scope="module")
def params() -> dict[str, jax.Array]:
    return init_params(SPEC, jax.random.key(0))


@pytest.fixture(scope="module")
def stores(params, tmp_path_factory) -> tuple[Activations, Activations]:
    """Features of all layers, and of layers 0 and 2."""
    places = np.arange(sum(COUNTS))
    rows = Rows("0", "span", np.repeat(np.arange(3), COUNTS), places, places + 1)
    folders = [tmp_path_factory.mktemp("features") for _ in range(2)]
    options = [CaptureOptions((SITE,), layers=layers) for layers in (None, (0, 2))]
    pairs = zip(folders, options, strict=True)
    return tuple(capture(SPEC, params, rows, DOCUMENTS, folder, option) for folder, option in pairs)


def test_the_used_layers_alone_are_stored(stores, params) -> None:
    every, used = stores
    np.testing.assert_array_equal(used.site(SITE), every.site(SITE)[[0, 2]])
    again = store.read(used.directory)
    assert (again.layers, again.numbers, again.place_of(2)) == (2, (0, 2), 1) and every.place_of(1) == 1
    with pytest.raises(InputError, match=r"holds the layers \[0, 2\], not layer 1"):
        used.place_of(1)
    np.testing.assert_array_equal(*(read_out_metric(SPEC, params, each) for each in stores))
    found, expected = (SourceFeatures.of(each, DOCUMENTS, LAYERS) for each in (used, every))
    number = np.asarray([7, 0, 1, 2, 5, 7])
    np.testing.assert_array_equal(found.rows(number), expected.rows(number))
    order = np.random.default_rng(0).permutation(sum(COUNTS))
    np.testing.assert_array_equal(found.reordered(order).rows(number), found.rows(order[number]))
    values = np.asarray(every.site(SITE), np.float64)[LAYERS]
    z = (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)
    np.testing.assert_allclose(found.rows(number), z[:, number], atol=1e-5)


def test_moments_in_blocks_are_those_of_all_rows(stores, monkeypatch) -> None:
    whole = moments_of(stores[0], LAYERS)
    monkeypatch.setattr(guidance, "BLOCK_ROWS", 3)
    values = np.asarray(stores[0].site(SITE), np.float64)[LAYERS]
    for found, before, truth in zip(moments_of(stores[0], LAYERS), whole, (values.mean(1), values.std(1)), strict=True):
        np.testing.assert_allclose(found, truth, rtol=1e-6)
        np.testing.assert_allclose(found, before, rtol=1e-6)


def test_a_process_reads_its_own_rows(stores) -> None:
    features = SourceFeatures.of(stores[1], DOCUMENTS, LAYERS)
    pieces = split([document.ids for document in DOCUMENTS], 16)
    whole = features.guide(pieces, 4, 4)
    mine = np.asarray([False, True, False, True])
    part = dataclasses.replace(features, own_rows=lambda rows: mine[:rows]).guide(pieces, 4, 4)
    np.testing.assert_array_equal(part.mask_br, whole.mask_br)
    np.testing.assert_array_equal(part.source_lbrk[:, 1], whole.source_lbrk[:, 1])
    assert not part.source_lbrk[:, [0, 2]].any() and whole.source_lbrk[:, 0].any()
    none = dataclasses.replace(features, own_rows=lambda rows: np.zeros(rows, bool)).guide(pieces, 4, 4)
    assert not none.source_lbrk.any()


def test_maps_are_split_like_parameters() -> None:
    assert map_sharding(Layout(), (3, 16, 24)) is None
    for mesh, shape, shard in (
        ("data=2,fsdp=4", (3, 16, 24), (3, 16, 6)),
        ("data=2,fsdp=2,tensor=2", (3, 16, 24), (3, 8, 12)),
        ("fsdp=4,tensor=2", (3, 15, 24), (3, 15, 6)),
    ):
        assert map_sharding(Layout(mesh), shape).shard_shape(shape) == shard


def test_low_rank_updates_are_split_along_the_axis_of_their_projection() -> None:
    """An axis without a rule, such as the rank, collided with the axis of layers, which has none either."""
    places = shardings_of(Layout("fsdp=4,tensor=2"), FAMILIES["llama"].params(SPEC), SPEC, rank=3)
    assert places["lora_a.blocks.q.weight"].shard_shape((3, 3, 24)) == (3, 3, 6)
    assert places["lora_b.blocks.q.weight"].shard_shape((3, 48, 3)) == (3, 24, 3)
