"""The table of what a merge did to every tensor, and the refusal to call a no-op a merge."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.errors import NoTransferError
from tmjax.models.spec import DecoderSpec, ParamSpec
from tmjax.sharding.hosts import to_host
from tmjax.typing import Array, ArrayLike, Params

#: Hugging Face name of a tensor -> column -> value.
Table = Mapping[str, Mapping[str, float]]
#: Smallest source contribution, as a fraction of the target's norm, that counts as a transfer.
NEGLIGIBLE = 1e-3
#: Columns of every row, beside alpha, beta and those of single operators: ||W^|| / ||W_T||, the same before norm
#: matching, ||W - W_T|| / ||W_T||, cosine of W^ and W_T, ||alpha Mask W^|| / ||W_T||, and ||(W - W_T) mu_in|| /
#: ||W_T mu_in||, the change of the mean output that a tensor without bias cannot make good.
COLUMNS = (
    "transported_to_target_norm",
    "raw_transported_to_target_norm",
    "effective_update",
    "cosine",
    "source_part",
    "dropped_mean",
)
#: Columns that say how much of a tensor came from the source; the largest counts.
SOURCE_COLUMNS = ("source_part", "source_solved")


def of_layer(value: ArrayLike | float, layer: int) -> float:
    """A coefficient in one layer: a number as it is, the mean over the heads or units of an array [L, ...]."""
    return float(value) if np.ndim(value) == 0 else float(np.asarray(value)[layer].mean())


@jax.jit
def _change(old: Array, before: Array, after: Array) -> Array:
    """Norms [3, S] over layers: of the target's tensor, of the change from `before`, of that from the target."""
    old, before, after = (x.astype(jnp.float32) for x in (old, before, after))
    parts = (old, after - before, after - old)
    return jnp.stack([jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))) for x in parts])


def changes(
    spec: DecoderSpec, param_specs: tuple[ParamSpec, ...], target: Params, before: Params, after: Params
) -> dict[str, tuple[float, float]]:
    """Measures the change of every tensor from `before` to `after`, and from the target to `after`.

    Returns:
        By Hugging Face name, both norms over that of the target's tensor; tensors that did not change are left out.
    """
    result: dict[str, tuple[float, float]] = {}
    for row in param_specs:
        if row.tied_to is not None or after[row.path] is before[row.path]:
            continue
        arrays = (jnp.asarray(params[row.path]) for params in (target, before, after))
        norms = _change(*(x if row.stacked else x[None] for x in arrays))
        size, step, whole = to_host(norms).astype(np.float64)
        size = np.maximum(size, 1e-30)
        ratios = zip(step / size, whole / size, strict=True)
        result |= {name: (float(a), float(b)) for name, (a, b) in zip(row.names(spec), ratios, strict=True)}
    return result


def joined_table(parts: Iterable[Table]) -> dict[str, dict[str, float]]:
    """Joins the rows of several operators, later ones first; every row has every column, 0 where nothing is said.

    `source_part` is the largest of all.
    """
    table: dict[str, dict[str, float]] = {}
    for part in parts:
        for name, cells in part.items():
            row = table.setdefault(name, dict.fromkeys((*COLUMNS, "alpha", "beta"), 0.0))
            largest = max(row["source_part"], cells.get("source_part", 0.0))
            row |= {**cells, "source_part": largest}
    columns = dict.fromkeys(column for row in table.values() for column in row)
    return {name: {column: row.get(column, 0.0) for column in columns} for name, row in table.items()}


def require_transfer(table: Table, *, allow_negligible: bool) -> str | None:
    """Refuses a merge in which nothing came from the source.

    Measurable is the largest ||alpha Mask W^|| / ||W_T|| over tensors from 1e-3 on, or as large a change of a tensor
    that was solved for by the source's predictions.

    Args:
        table: The update table.
        allow_negligible: Whether to return a warning instead.

    Returns:
        The warning; None where something came from the source.

    Raises:
        NoTransferError: Nothing measurable came from the source.
    """
    largest = max((row.get(column, 0.0) for row in table.values() for column in SOURCE_COLUMNS), default=0.0)
    if largest >= NEGLIGIBLE:
        return None
    message = (
        f"nothing measurable came from the source: its largest part in a tensor is {largest:.1e} of the target's norm "
        f"(limit {NEGLIGIBLE:g})"
    )
    if allow_negligible:
        return message
    raise NoTransferError(f"{message}; use preset predictions, or a larger alpha, or pass --allow-negligible")
