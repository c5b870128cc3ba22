"""Products and bytes of a program, counted from its jaxpr: bodies of loops as often as they run.

Compiled programs do not tell them: the TPU compiler counts loop bodies once and hides attention in custom calls, the
GPU backend counts nothing. Shapes of a jaxpr are those of all devices, except inside `shard_map`, where they are one
device's.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from tmjax.models.experts.grouped import grouped_rows, grouped_weights

#: Products of rows with the matrices of their groups, by the names of their functions; their loops depend on data.
_GROUPED = frozenset(function.__name__ for function in (grouped_rows, grouped_weights))


@dataclass
class Count:
    """Work of one device.

    Attributes:
        flops: Products and additions by class, see `Figures.peak`.
        bytes: Bytes that matrix products read and write.
    """

    flops: dict[str, float] = field(default_factory=dict)
    bytes: float = 0.0

    @property
    def total(self) -> float:
        """Products and additions of all classes."""
        return sum(self.flops.values())

    def add(self, kind: str, flops: float, moved: float) -> None:
        """Adds work."""
        self.flops[kind] = self.flops.get(kind, 0.0) + flops
        self.bytes += moved


def counted(jaxpr: Any, mesh: Mapping[str, int], turns: int = 1) -> Count:
    """Counts the matrix products and factorisations of a program on one device.

    Args:
        jaxpr: The program, closed.
        mesh: Sizes of the mesh axes. Outside `shard_map` products are taken to be split evenly over all devices, and
            weights (operands of two axes beside larger ones) to be read whole but for the axis `tensor`.
        turns: Turns of loops whose number the data decides.
    """
    result = Count()
    _walk(getattr(jaxpr, "jaxpr", jaxpr), result, 1.0, (math.prod(mesh.values()), mesh.get("tensor", 1)), turns)
    return result


def _walk(jaxpr: Any, result: Count, times: float, shares: tuple[int, int], turns: int) -> None:
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            _product(equation, result, times, shares)
        elif name in ("cholesky", "triangular_solve", "lu", "eigh"):
            _factorisation(equation, result, times, shares)
        elif name in ("jit", "pjit") and params.get("name") in _GROUPED:
            _grouped_product(equation, result, times, shares)
        elif name == "scan":
            _walk(params["jaxpr"].jaxpr, result, times * params["length"], shares, turns)
        elif name == "while":
            # Only the outermost such loop is taken to run for `turns`.
            _walk(params["body_jaxpr"].jaxpr, result, times * turns, shares, 1)
        elif name == "cond":
            branches = []
            for branch in params["branches"]:
                branches.append(Count())
                _walk(branch.jaxpr, branches[-1], times, shares, turns)
            largest = max(branches, key=lambda count: count.total)
            for kind, flops in largest.flops.items():
                result.add(kind, flops, 0.0)
            result.bytes += largest.bytes
        else:
            inner = (1, 1) if name == "shard_map" else shares
            for part in _parts(params):
                _walk(part, result, times, inner, turns)


def _parts(params: Mapping[str, Any]) -> Iterator[Any]:
    """Programs inside an equation: of a call, of a custom derivative. Rules of derivatives are functions, not these."""
    for value in params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner


def _size(value: Any) -> int:
    return math.prod(value.aval.shape) * jnp.dtype(value.aval.dtype).itemsize


def _product(equation: Any, result: Count, times: float, shares: tuple[int, int]) -> None:
    left, right = equation.invars
    (contracting, _), _ = equation.params["dimension_numbers"]
    (out,) = equation.outvars
    depth = math.prod(left.aval.shape[axis] for axis in contracting)
    flops = 2 * depth * math.prod(out.aval.shape)
    kind = "bfloat16"
    if jnp.dtype(left.aval.dtype).itemsize >= 4:
        given = equation.params["precision"]
        exact = jax.lax.Precision.HIGHEST in (given if isinstance(given, tuple) else (given,))
        kind = "float32" if exact else "tensor32"
    devices, tensor = shares
    moved = 0.0
    for operand, other in ((left, right), (right, left)):
        weight = len(operand.aval.shape) == 2 and math.prod(operand.aval.shape) > 0 and _is_weight(operand, other)
        moved += _size(operand) / (tensor if weight else devices)
    result.add(kind, times * flops / devices, times * (moved + _size(out) / devices))


def _grouped_product(equation: Any, result: Count, times: float, shares: tuple[int, int]) -> None:
    """Every row meets one matrix; all matrices are read."""
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    flops = 2 * math.prod(left.shape) * out.shape[-1]
    kind = "float32" if jnp.dtype(left.dtype).itemsize >= 4 else "bfloat16"
    moved = sum(map(_size, (*equation.invars[:2], *equation.outvars)))
    result.add(kind, times * flops / shares[0], times * moved / shares[0])


def _is_weight(operand: Any, other: Any) -> bool:
    """Whether a matrix is the one that all devices read: the larger one, or the one beside more axes."""
    return len(other.aval.shape) > 2 or _size(operand) >= _size(other)


def _factorisation(equation: Any, result: Count, times: float, shares: tuple[int, int]) -> None:
    name = equation.primitive.name
    *batch, rows, columns = equation.invars[-1 if name == "triangular_solve" else 0].aval.shape
    n = equation.invars[0].aval.shape[-1]
    flops = {"cholesky": n**3 / 3, "lu": 2 * n**3 / 3, "eigh": 9 * n**3, "triangular_solve": n * rows * columns}[name]
    moved = sum(map(_size, (*equation.invars, *equation.outvars)))
    result.add("float32", times * math.prod(batch) * flops / shares[0], times * moved / shares[0])
