"""Batches that are made ahead in another thread, and the best parameters that stay on the devices."""

import itertools
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from helpers import SPEC

from tmjax.errors import InputError
from tmjax.models.decoder import init_params
from tmjax.models.families import FAMILIES
from tmjax.sharding.mesh import Layout
from tmjax.train.checkpoints import Checkpoints
from tmjax.train.data import Batch, Guide
from tmjax.train.feed import ahead, place, step_data
from tmjax.train.modes import Plain, shardings_of
from tmjax.train.optimizer import TrainConfig
from tmjax.train.selection import Selection
from tmjax.train.step import Objective, start


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "tmjax-batches"]


def test_items_come_in_order_and_are_made_in_another_thread() -> None:
    makers = []

    def items() -> Iterator[int]:
        for number in range(20):
            makers.append(threading.current_thread())
            yield number

    assert list(ahead(items())) == list(range(20))
    assert {thread.name for thread in makers} == {"tmjax-batches"} and not threads()


def test_items_are_made_before_they_are_asked_for_but_not_all_of_them() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            yield number

    iterator = ahead(items(), depth=2)
    assert next(iterator) == 0
    deadline = time.monotonic() + 30
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(made) == 4  # one taken, two waiting, one at hand
    iterator.close()
    assert not threads()


def test_an_error_is_raised_where_its_item_is_asked_for() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise InputError("line 2 is wrong")

    iterator = ahead(items())
    assert next(iterator) == 1
    with pytest.raises(InputError, match="line 2 is wrong"):
        next(iterator)
    assert not threads()


@pytest.mark.parametrize("mesh", [None, "data=2,fsdp=4"])
def test_steps_hold_whole_groups_of_batches_on_the_devices(mesh) -> None:
    layout, rng = Layout(mesh), np.random.default_rng(0)

    def batch() -> Batch:
        ids, targets = rng.integers(0, 9, (2, 8, 5))
        guide = Guide(np.zeros((8, 2), np.int32), np.ones((8, 2), "f4"), rng.random((3, 8, 2, 4), np.float32))
        return Batch(ids, targets, (rng.random((8, 5)) < 0.5).astype("f4"), guide)

    batches = [batch() for _ in range(5)]
    steps = list(step_data(batches, layout, 2))
    assert [len(step.batches) for step in steps] == [2, 2]
    for step, pair in zip(steps, (batches[:2], batches[2:4]), strict=True):
        assert step.tokens == sum(int(each.mask_bt.sum()) for each in pair)
        for placed, given in zip(jax.tree.leaves(step.batches), jax.tree.leaves(pair), strict=True):
            assert isinstance(placed, jax.Array)
            np.testing.assert_array_equal(placed, given)
    source = place(layout, batches[0]).guide.source_lbrk
    assert mesh is None or source.sharding.shard_shape(source.shape) == (3, 1, 2, 4)


def test_own_rows_are_those_on_the_devices_of_this_process() -> None:
    assert Layout().own_rows(3).all() and Layout("data=2,fsdp=2,tensor=2").own_rows(8).all()


def test_the_best_is_a_copy_laid_out_as_it_was() -> None:
    layout = Layout("fsdp=8")
    sharding = layout.param_sharding("x", ("vocab", "embed"), (6, 16))
    array = jax.device_put(np.arange(96, dtype=np.float32).reshape(6, 16), sharding)
    selection = Selection()
    selection.see(1, 2.0, {"x": array})
    selection.see(2, 3.0, {"x": array + 1})
    kept = selection.trained["x"]
    array.delete()  # as a step that donates it does
    np.testing.assert_array_equal(kept, np.arange(96).reshape(6, 16))
    assert kept.sharding.is_equivalent_to(sharding, 2) and (selection.step, selection.worse) == (1, 1)


@pytest.mark.slow
def test_checkpoints_give_state_and_best_back_laid_out_as_they_were(tmp_path) -> None:
    layout = Layout("fsdp=8")
    places = shardings_of(layout, FAMILIES["llama"].params(SPEC), SPEC)
    params = {path: jax.device_put(x, places[path]) for path, x in init_params(SPEC, jax.random.key(0)).items()}
    objective = Objective(SPEC, TrainConfig(steps=8, warmup=2), Plain(), layout.mesh)
    state, selection = start(objective, params), Selection()
    selection.see(3, 2.0, params)
    keeper = Checkpoints(tmp_path / "kept", "key")
    keeper.save(3, state, selection)
    keeper.wait()
    step, again, best = keeper.latest(state)
    keeper.close()
    assert step == 3 and (best.loss, best.step, best.history) == (2.0, 3, [(3, 2.0)])
    for found in (again.trained, best.trained):
        for path, value in params.items():
            np.testing.assert_array_equal(found[path], value)
            assert found[path].sharding.is_equivalent_to(value.sharding, value.ndim)
