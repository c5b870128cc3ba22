"""Modes of training: maps from trained and frozen arrays to the parameters of the model.

Every mode has `params(trained, frozen)`, which the loss goes through and which, after training, folds the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from tmjax.models.blocks.primitives import einsum
from tmjax.models.spec import DecoderSpec, ParamSpec, biases, projections
from tmjax.sharding.mesh import Layout
from tmjax.transfer.projections import Transported
from tmjax.typing import Array, ArrayLike, Params


class Residual(NamedTuple):
    """A frozen part alpha * Mask * Delta of a parameter; the mask is broadcastable to Delta."""

    alpha: ArrayLike
    mask: ArrayLike
    delta: ArrayLike

    def value(self) -> Array:
        """alpha * Mask * Delta in float32."""
        return self.alpha * self.mask * jnp.asarray(self.delta, jnp.float32)


#: Frozen arrays, by path: parameters or residuals.
Frozen = Mapping[str, ArrayLike | Residual]


class Mode(Protocol):
    """A hashable description, static in jitted functions."""

    def params(self, trained: Params, frozen: Frozen) -> dict[str, Array]:
        """The parameters of the model."""


@dataclass(frozen=True)
class Plain:
    """All parameters are trained; with residuals among the frozen, W = W_base + alpha Mask Delta (METHOD 1.6)."""

    def params(self, trained: Params, frozen: Frozen) -> dict[str, Array]:
        """Trained parameters plus their frozen residuals."""
        return dict(trained) | {path: trained[path] + residual.value() for path, residual in frozen.items()}


@dataclass(frozen=True)
class FrozenBase:
    """The transported Delta is trained, W = W_base + alpha Mask Delta; everything else is frozen.

    Frozen are the parameters by path and, under `residual.PATH`, alpha and mask with an empty Delta.
    """

    def params(self, trained: Params, frozen: Frozen) -> dict[str, Array]:
        """Frozen parameters plus alpha Mask Delta of the trained Deltas."""
        base = {path: value for path, value in frozen.items() if not isinstance(value, Residual)}
        return base | {
            path: base[path] + frozen[f"residual.{path}"]._replace(delta=delta).value()
            for path, delta in trained.items()
            if path in base
        }


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of frozen projections, W = W_base + (alpha / rank) B A (Hu et al. 2021, arXiv:2106.09685).

    `paths` are the weights [L, out, in] that have one; A [L, rank, in] and B [L, out, rank] are trained under
    `lora_a.PATH` and `lora_b.PATH`.
    """

    paths: tuple[str, ...]
    rank: int = 8
    alpha: float = 16.0

    def start(self, params: Params, key: Array, shardings: Mapping[str, NamedSharding]) -> dict[str, Array]:
        """Returns the initial matrices of `peft`: A uniform as Kaiming, B zero; laid out by `shardings`, by path."""
        trained = {}
        for number, path in enumerate(self.paths):
            layers, out, into = params[path].shape
            bound = into**-0.5
            a = jax.random.uniform(
                jax.random.fold_in(key, number), (layers, self.rank, into), minval=-bound, maxval=bound
            )
            trained |= {f"lora_a.{path}": a, f"lora_b.{path}": jnp.zeros((layers, out, self.rank))}
        return {path: jax.device_put(x, shardings[path]) if path in shardings else x for path, x in trained.items()}

    def params(self, trained: Params, frozen: Frozen) -> dict[str, Array]:
        """Frozen parameters plus the products."""
        return dict(frozen) | {
            path: frozen[path]
            + (self.alpha / self.rank) * einsum("lor,lri->loi", trained[f"lora_b.{path}"], trained[f"lora_a.{path}"])
            for path in self.paths
        }


def residuals(
    param_specs: tuple[ParamSpec, ...], transported: Mapping[str, Transported], alphas: Mapping[str, float]
) -> dict[str, Residual]:
    """Returns alpha Mask Delta of every transported weight and, where the target has one, its bias, by path."""
    weights, offsets = projections(param_specs), biases(param_specs)
    result = {}
    for role, item in transported.items():
        alpha = jnp.float32(alphas[role])
        result[weights[role].path] = Residual(alpha, jnp.asarray(item.weight_mask), item.weight)
        if item.bias is not None and role in offsets:
            result[offsets[role].path] = Residual(alpha, jnp.asarray(item.bias_mask), item.bias)
    return result


def shardings_of(
    layout: Layout, param_specs: tuple[ParamSpec, ...], spec: DecoderSpec, rank: int = 0
) -> dict[str, NamedSharding]:
    """Returns the shardings of trained parameters by path; with a rank, those of LoRA too. Empty without a mesh."""
    if layout.mesh is None:
        return {}
    result = {row.path: layout.place(row, row.stacked_shape(spec)) for row in param_specs if row.tied_to is None}
    for row in projections(param_specs).values() if rank else ():
        layers, out, into = row.stacked_shape(spec)
        for name, axes, shape in (
            ("lora_a", ("rank", row.axes[1]), (layers, rank, into)),
            ("lora_b", (row.axes[0], "rank"), (layers, out, rank)),
        ):
            result[f"{name}.{row.path}"] = layout.param_sharding(row.path, axes, shape)
    return {path: _plain(layout, sharding) for path, sharding in result.items()}


def map_sharding(layout: Layout, shape: tuple[int, int, int]) -> NamedSharding | None:
    """Returns the sharding of the maps of guidance [layer, source unit, target unit]; None without a mesh."""
    if layout.mesh is None:
        return None
    units = "mlp" if shape[1] % layout.sizes["tensor"] == 0 else "rank"
    return _plain(layout, layout.param_sharding("guide.weight", (units, "embed"), shape))


def _plain(layout: Layout, sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding as XLA writes it, without axes of one device; else a second step would be compiled anew."""
    axes = [axis if axis is not None and layout.sizes[axis] > 1 else None for axis in sharding.spec]
    while axes and axes[-1] is None:
        axes.pop()
    return NamedSharding(layout.mesh, PartitionSpec(*axes))
