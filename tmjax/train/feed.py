"""The batches of training steps, read and placed on the devices in a thread of their own while the devices compute."""

import itertools
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np

from tmjax.sharding.mesh import Layout
from tmjax.train.data import Batch

T = TypeVar("T")
#: Seconds after which a thread whose items nobody takes looks whether it is still needed.
_LOOK_S = 0.1


class StepData(NamedTuple):
    """The batches of one step, on their devices, and the number of tokens that they predict."""

    batches: list[Batch]
    tokens: int


def place(layout: Layout, batch: Batch) -> Batch:
    """Puts a batch on the devices of a layout."""
    guide, teacher = batch.guide, batch.teacher
    if guide is not None:
        source = layout.place_batch(np.asarray(guide.source_lbrk), axis=1)
        rest = (layout.place_batch(np.asarray(x)) for x in (guide.position_br, guide.mask_br))
        guide = type(guide)(*rest, source)
    if teacher is not None:
        teacher = type(teacher)(*(layout.place_batch(np.asarray(part)) for part in teacher))
    parts = (batch.ids_bt, batch.targets_bt, batch.mask_bt)
    return Batch(*(layout.place_batch(np.asarray(part)) for part in parts), guide, teacher)


def step_data(data: Iterable[Batch], layout: Layout, accumulate: int) -> Iterator[StepData]:
    """Groups batches by steps of `accumulate` batches, on their devices; ends before a step that is not whole."""
    batches = iter(data)
    while len(group := list(itertools.islice(batches, accumulate))) == accumulate:
        tokens = sum(int(np.count_nonzero(batch.mask_bt)) for batch in group)
        yield StepData([place(layout, batch) for batch in group], tokens)


def ahead(items: Iterable[T], *, depth: int = 1) -> Iterator[T]:
    """Makes items in another thread, so that the next ones are ready when they are asked for.

    Args:
        items: The items, in order; an exception that making one raises is raised where it is asked for.
        depth: Items that wait, beside the one that is being made.

    Yields:
        The items. The thread ends with the iterator.
    """
    ready: queue.Queue[tuple[list[T], BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def hand_over(made: list[T], error: BaseException | None = None) -> bool:
        while not closed.is_set():
            try:
                ready.put((made, error), timeout=_LOOK_S)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not hand_over([item]):
                    return
            hand_over([])
        except BaseException as error:  # to be raised in the thread that asks
            hand_over([], error)

    thread = threading.Thread(target=make, name="tmjax-batches", daemon=True)
    thread.start()
    try:
        while True:
            made, error = ready.get()
            if error is not None:
                raise error
            if not made:
                return
            yield made[0]
    finally:
        closed.set()
        thread.join()
