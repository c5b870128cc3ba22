"""What a merge did to every tensor, and the refusal to call a no-op a merge."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.errors import NoTransferError
from tmjax.fuse.apply import Coefficients, Transported
from tmjax.models.spec import DecoderSpec, ParamSpec, projections
from tmjax.sharding.hosts import to_host
from tmjax.typing import Array, ArrayLike, Params

#: Smallest source contribution, as a fraction of the target's norm, that counts as a transfer.
NEGLIGIBLE = 1e-3


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
        columns = {
            "transported_to_target_norm": n["transported"] / old,
            "raw_transported_to_target_norm": n["raw"] / old,
            "effective_update": n["update"] / old,
            "cosine": n["inner"] / (old * transport),
            "source_part": n["part"] / old,
            "dropped_mean": n["shift"] / np.maximum(n["output"], 1e-30) if item.bias is None else n["shift"] * 0,
        }
        for layer, name in enumerate(row.names(spec)):
            values = {key: float(column[layer]) for key, column in columns.items()}
            table[name] = values | {"alpha": of_layer(alpha, layer), "beta": of_layer(beta, layer)}
    return table


def require_transfer(table: Mapping[str, Mapping[str, float]], *, allow_negligible: bool) -> str | None:
    """Raises NoTransferError if no tensor got a measurable part from the source (`allow_negligible`: a warning).

    Measurable: the largest ||alpha Mask W^|| / ||W_T|| over tensors is at least 1e-3.
    """
    largest = max((row["source_part"] for row in table.values()), default=0.0)
    if largest >= NEGLIGIBLE:
        return None
    message = (
        f"nothing measurable came from the source: its largest part in a tensor is {largest:.1e} of the target's norm "
        f"(limit {NEGLIGIBLE:g})"
    )
    if allow_negligible:
        return message
    raise NoTransferError(f"{message}; use preset barycentric or a larger alpha, or pass --allow-negligible")
