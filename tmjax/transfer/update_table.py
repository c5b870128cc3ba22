"""What a merge did to every tensor, and the refusal to call a no-op a merge."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.checkpoints.model import Model
from tmjax.errors import NoTransferError
from tmjax.models.spec import DecoderSpec, ParamSpec, projections
from tmjax.sharding.hosts import to_host
from tmjax.transfer.apply import Coefficients, Transported
from tmjax.transfer.operators.embeddings import EMBEDDINGS, Blended
from tmjax.transfer.operators.predictions import Solved
from tmjax.typing import Array, ArrayLike, Params

#: Smallest source contribution, as a fraction of the target's norm, that counts as a transfer.
NEGLIGIBLE = 1e-3
#: What `update_table` tells of every tensor, beside alpha and beta.
COLUMNS = (
    "transported_to_target_norm",
    "raw_transported_to_target_norm",
    "effective_update",
    "cosine",
    "source_part",
    "dropped_mean",
)


@jax.jit
def _tensor_norms(old: Array, new: Array, item: Transported, alpha: Array) -> dict[str, Array]:
    def norm(x: Array) -> Array:
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2)))

    old, new = old.astype(jnp.float32), new.astype(jnp.float32)
    shift = jnp.einsum("loi,li->lo", new - old, item.input_mean, precision=jax.lax.Precision.HIGHEST)
    return {
        "old": norm(old),
        "transported": norm(item.weight),
        "raw": item.raw_norm,
        "part": norm(alpha * item.weight_mask * item.weight),
        "update": norm(new - old),
        "inner": jnp.sum(old * item.weight, axis=(1, 2)),
        "shift": jnp.sqrt(jnp.sum(shift * shift, axis=1)),
        "output": jnp.sqrt(jnp.sum(jnp.square(jnp.einsum("loi,li->lo", old, item.input_mean)), axis=1)),
    }


def of_layer(value: ArrayLike | float, layer: int) -> float:
    """A coefficient in one layer: a number as it is, the mean over the heads or units of an array [L, ...]."""
    return float(value) if np.ndim(value) == 0 else float(np.asarray(value)[layer].mean())


def update_table(
    spec: DecoderSpec,
    rows: tuple[ParamSpec, ...],
    target: Params,
    fused: Params,
    transported: Mapping[str, Transported],
    coefficients: Coefficients,
) -> dict[str, dict[str, float]]:
    """Per weight tensor, under its Hugging Face name.

    transported_to_target_norm ||W^|| / ||W_T||, the same before norm matching (raw_...), effective_update
    ||W - W_T|| / ||W_T||, cosine of W^ and W_T, source_part ||alpha Mask W^|| / ||W_T||, alpha, beta, and dropped_mean
    ||(W - W_T) mu_in|| / ||W_T mu_in||: the change of the mean output that a tensor without bias cannot make good.
    """
    table = {}
    for role, item in transported.items():
        row = projections(rows)[role]
        alpha, beta = coefficients[role]
        norms = to_host(_tensor_norms(target[row.path], fused[row.path], item, jnp.asarray(alpha, jnp.float32)))
        n = {key: value.astype(np.float64) for key, value in norms.items()}  # 1e-30 squared is no float32
        old, transport = np.maximum(n["old"], 1e-30), np.maximum(n["transported"], 1e-30)
        values = (
            n["transported"] / old,
            n["raw"] / old,
            n["update"] / old,
            n["inner"] / (old * transport),
            n["part"] / old,
            n["shift"] / np.maximum(n["output"], 1e-30) if item.bias is None else n["shift"] * 0,
        )
        columns = dict(zip(COLUMNS, values, strict=True))
        for layer, name in enumerate(row.names(spec)):
            values = {key: float(column[layer]) for key, column in columns.items()}
            table[name] = values | {"alpha": of_layer(alpha, layer), "beta": of_layer(beta, layer)}
    return table


def with_blended(
    table: Mapping[str, Mapping[str, float]], target: Model, blended: Blended
) -> dict[str, dict[str, float]]:
    """The table with a row of the embeddings, (1 - w) e + w e^: `alpha` is the mean of w over tokens, `beta` minus it.

    The source's part is ||w e^||; a part that came through the stream's plan before, if any, is in the same row.
    """
    name = next(row.names(target.spec)[0] for row in target.rows if row.path == EMBEDDINGS)
    held = (target.params[EMBEDDINGS], blended.params[EMBEDDINGS])
    own, now = (np.asarray(to_host(x), np.float64) for x in held)
    size = max(float(np.linalg.norm(own)), 1e-30)
    mapped = blended.mapped.astype(np.float64)
    transported, part = float(np.linalg.norm(mapped)), float(np.linalg.norm(blended.weight[:, None] * mapped))
    earlier = table.get(name, {}).get("source_part", 0.0)
    row = {
        "transported_to_target_norm": transported / size,
        "raw_transported_to_target_norm": transported / size,
        "effective_update": float(np.linalg.norm(now - own)) / size,
        "cosine": float((own * mapped).sum()) / (size * max(transported, 1e-30)),
        "source_part": max(part / size, earlier),
        "dropped_mean": 0.0,
        "alpha": float(blended.weight.mean()),
        "beta": -float(blended.weight.mean()),
    }
    return {**table, name: row}


def with_solved(
    table: Mapping[str, Mapping[str, float]], target: Model, before: Params, solved: Solved, paths: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The table with what the solve changed: `solved` is the norm of its change over the target's.

    `source_solved` is the same if a round listened to the source, and 0 if all took the true tokens alone. Tensors that
    were solved for without anything having been transported into them get rows.
    """
    found = {name: {**row, "solved": 0.0, "source_solved": 0.0} for name, row in table.items()}
    rows: dict[str, ParamSpec] = {row.path: row for row in target.rows}
    for path in paths:
        names = rows[path].names(target.spec)
        held = (np.asarray(to_host(x[path]), np.float64) for x in (target.params, before, solved.params))
        old, was, now = (x.reshape(len(names), -1) for x in held)
        size = np.maximum(np.linalg.norm(old, axis=1), 1e-30)
        change, whole = np.linalg.norm(now - was, axis=1) / size, np.linalg.norm(now - old, axis=1) / size
        for layer, name in enumerate(names):
            row = found.setdefault(name, dict.fromkeys((*COLUMNS, "alpha", "beta"), 0.0))
            row["effective_update"], row["solved"] = float(whole[layer]), float(change[layer])
            row["source_solved"] = float(change[layer]) if solved.from_source else 0.0
    return found


def require_transfer(table: Mapping[str, Mapping[str, float]], *, allow_negligible: bool) -> str | None:
    """Raises NoTransferError if no tensor got a measurable part from the source (`allow_negligible`: a warning).

    Measurable: the largest ||alpha Mask W^|| / ||W_T|| over tensors is at least 1e-3, or the change of one that was
    solved for by the source's word.
    """
    largest = max((max(row["source_part"], row.get("source_solved", 0.0)) for row in table.values()), default=0.0)
    if largest >= NEGLIGIBLE:
        return None
    message = (
        f"nothing measurable came from the source: its largest part in a tensor is {largest:.1e} of the target's norm "
        f"(limit {NEGLIGIBLE:g})"
    )
    if allow_negligible:
        return message
    raise NoTransferError(f"{message}; use preset predictions, or a larger alpha, or pass --allow-negligible")
