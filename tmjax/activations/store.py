"""Activations on disk: one `[layer, row, unit]` float32 array per site, with the identity of the rows."""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tmjax.checkpoints.hub import read_json
from tmjax.errors import InputError
from tmjax.files.atomic import write_json
from tmjax.text.rows import Rows

META = "meta.json"
ROWS = "rows.npz"


@dataclass(frozen=True)
class Layers(Sequence[np.ndarray]):
    """The layers of a stored site, each read when asked for: [row, unit] float32.

    Rows are in `order` and units in `unit_order` [layer, unit] if these are given. Copies, not a mapping: pages of a
    mapped file count as memory of this process until it is unmapped.
    """

    file: Path
    order: np.ndarray | None = None
    unit_order: np.ndarray | None = None

    @functools.cached_property
    def shape(self) -> tuple[int, int, int]:
        """Layers, rows, units."""
        return np.load(self.file, mmap_mode="r").shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, layer: int) -> np.ndarray:
        stored = np.load(self.file, mmap_mode="r")[layer]
        values = np.array(stored) if self.order is None else stored[self.order]
        return values if self.unit_order is None else values[:, self.unit_order[layer]]


@dataclass(frozen=True)
class Activations:
    """Activations of one model: read lazily from a directory.

    `order` and `unit_order` (by site, [layer, unit]) are those in which `site` and `layers_of` give rows and units.
    """

    directory: Path
    rows: Rows
    layers: int
    sites: Mapping[str, int]
    order: np.ndarray | None = None
    unit_order: Mapping[str, np.ndarray] = field(default_factory=dict)
    #: The model's layers that are stored, in order; None: all.
    numbers: tuple[int, ...] | None = None

    def place_of(self, layer: int) -> int:
        """Returns the place in the arrays of one of the model's layers; raises InputError if it is not stored."""
        if self.numbers is None:
            return layer
        if layer not in self.numbers:
            raise InputError(f"{self.directory} holds the layers {list(self.numbers)}, not layer {layer}")
        return self.numbers.index(layer)

    def site(self, name: str) -> np.ndarray:
        """The `[layer, row, unit]` float32 array of a site; mapped from disk where rows and units are as recorded."""
        if self.order is None and name not in self.unit_order:
            return np.load(self._file(name), mmap_mode="r")
        return np.stack(list(self.layers_of(name)))

    def layers_of(self, name: str) -> Layers:
        """The same, a layer at a time."""
        return Layers(self._file(name), self.order, self.unit_order.get(name))

    def reordered(self, order: np.ndarray) -> "Activations":
        """These activations with the rows in another order, as if recorded at other pieces of text."""
        return replace(self, order=order)

    def permuted(self, unit_order: Mapping[str, np.ndarray]) -> "Activations":
        """These activations with the units of sites in another order [layer, unit], as if recorded of other units."""
        return replace(self, unit_order=unit_order)

    def _file(self, name: str) -> Path:
        if name not in self.sites:
            raise InputError(f"{self.directory} holds no activations of site {name}; it has {', '.join(self.sites)}")
        return self.directory / f"{name}.npy"


def create(
    directory: Path, rows: Rows, layers: int, sites: Mapping[str, int], numbers: Sequence[int] | None = None
) -> None:
    """Makes the files of an activation store, filled with zeros, in an existing directory.

    `numbers` are the model's layers that are stored, if not all of its `layers`.
    """
    layers = layers if numbers is None else len(numbers)
    np.savez(directory / ROWS, document=rows.document, start=rows.start, end=rows.end)
    meta = {"texts_sha256": rows.texts_sha256, "pooling": rows.pooling, "layers": layers, "sites": dict(sites)}
    meta |= {} if numbers is None else {"numbers": list(numbers)}
    write_json(directory / META, meta)
    for site, units in sites.items():
        np.lib.format.open_memmap(directory / f"{site}.npy", "w+", np.float32, (layers, len(rows), units))


def write_rows(directory: Path, site: str, values: Mapping[int, np.ndarray]) -> None:
    """Writes blocks [layer, rows, unit] of one site, each from its first row on.

    Not through a mapping: pages of a mapped file count as memory of this process, and on a shared file system two
    hosts that map the same page would undo each other's rows.
    """
    file = directory / f"{site}.npy"
    array = np.load(file, mmap_mode="r")
    layer_bytes, row_bytes, first = array.strides[0], array.strides[1], array.offset
    descriptor = os.open(file, os.O_WRONLY)
    try:
        for start, block in values.items():
            for layer, rows in enumerate(np.ascontiguousarray(block, np.float32)):
                _write_all(descriptor, rows, first + layer * layer_bytes + start * row_bytes)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, values: np.ndarray, offset: int) -> None:
    left = memoryview(values.reshape(-1).view(np.uint8))
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


def read(directory: Path) -> Activations:
    """Opens a store written by `create`."""
    meta = read_json(directory / META)
    with np.load(directory / ROWS) as arrays:
        rows = Rows(meta["texts_sha256"], meta["pooling"], arrays["document"], arrays["start"], arrays["end"])
    numbers = tuple(meta["numbers"]) if "numbers" in meta else None
    return Activations(directory, rows, meta["layers"], meta["sites"], numbers=numbers)
