"""Other weights for the same function, in NumPy and written from the architecture alone: what alignment must undo.

`disguised` permutes, rotates and rescales whatever may be; `widened` duplicates units, which then share what they had;
`deepened` inserts layers that do nothing.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tmjax.checkpoints.model import Model
from tmjax.models.spec import DecoderSpec

Params = dict[str, np.ndarray]
WRITES_STREAM, READS_STREAM = ("o", "down"), ("q", "k", "v", "gate", "up")


def params_of(model: Model) -> Params:
    return {path: np.asarray(value, np.float64) for path, value in model.params.items()}


def with_spec(model: Model, spec: DecoderSpec, params: Params) -> Model:
    return dataclasses.replace(model, spec=spec, params={path: x.astype(np.float32) for path, x in params.items()})


def _rows(params: Params, role: str, change) -> None:
    """Changes output units: the last axis but one of the weight, the last of the bias."""
    params[f"blocks.{role}.weight"] = np.moveaxis(change(np.moveaxis(params[f"blocks.{role}.weight"], -2, -1)), -1, -2)
    if f"blocks.{role}.bias" in params:
        params[f"blocks.{role}.bias"] = change(params[f"blocks.{role}.bias"])


def _columns(params: Params, role: str, change) -> None:
    if f"blocks.{role}.weight" in params:
        params[f"blocks.{role}.weight"] = change(params[f"blocks.{role}.weight"])


def _names(params: Params, *names: str) -> list[str]:
    return [name for name in names if name in params]


def _norm_names(params: Params, spec: DecoderSpec) -> list[str]:
    found = [path for path in params if "norm" in path and path.split(".")[-2] not in ("q_norm", "k_norm")]
    assert spec.pre_norm and not spec.post_norm and not spec.norm_offset
    return found


def take_stream(params: Params, spec: DecoderSpec, chosen: np.ndarray, share: np.ndarray) -> None:
    """Stream unit i becomes old unit chosen[i]; what reads it gets the part share[i]."""
    for path in [*_names(params, "embed.weight"), *_norm_names(params, spec)]:
        params[path] = params[path][..., chosen]
    for role in WRITES_STREAM:
        _rows(params, role, lambda w: w[..., chosen])
    for role in READS_STREAM:
        _columns(params, role, lambda w: w[..., chosen] * share)
    if "head.weight" in params:
        params["head.weight"] = params["head.weight"][:, chosen] * share
    else:
        for path in _names(params, "norm.weight", "norm.bias"):
            params[path] = params[path] * share


def take_mlp(params: Params, chosen: np.ndarray, share: np.ndarray) -> None:
    for role in ("gate", "up"):
        if f"blocks.{role}.weight" in params:
            _rows(params, role, lambda w: w[..., chosen])
    _columns(params, "down", lambda w: w[..., chosen] * share)


def units(heads: np.ndarray, head_dim: int) -> np.ndarray:
    return (heads[:, None] * head_dim + np.arange(head_dim)).reshape(-1)


def take_groups(params: Params, spec: DecoderSpec, groups: np.ndarray, queries: np.ndarray, share: np.ndarray) -> None:
    """Key-value heads `groups` and query heads `queries`; the share of a query head is what its output keeps."""
    for role in ("k", "v"):
        _rows(params, role, lambda w: w[..., units(groups, spec.head_dim)])
    _rows(params, "q", lambda w: w[..., units(queries, spec.head_dim)])
    wide = np.repeat(share, spec.head_dim)
    _columns(params, "o", lambda w: w[..., units(queries, spec.head_dim)] * wide)


def disguised(model: Model, seed: int = 0) -> Model:
    """A copy whose units are permuted, rotated and rescaled wherever the function allows it."""
    rng, spec, params = np.random.default_rng(seed), model.spec, params_of(model)
    each, d, layers = spec.heads // spec.kv_heads, spec.head_dim, spec.layers

    def factors(*shape: int) -> np.ndarray:
        return np.exp(rng.uniform(-0.7, 0.7, shape))

    # The stream as a whole is doubled; the norms' epsilon with it.
    double = 2.0
    params["embed.weight"] *= double
    for role in WRITES_STREAM:
        _rows(params, role, lambda w: w * double)
    if "head.weight" not in params:
        for path in _names(params, "norm.weight", "norm.bias"):
            params[path] /= double
    # What a norm writes, and who reads it.
    readers = {"blocks.attn_norm": ("q", "k", "v"), "blocks.mlp_norm": ("gate", "up")}
    for base, roles in readers.items():
        scale = factors(layers, spec.hidden)
        for path in _names(params, f"{base}.weight", f"{base}.bias"):
            params[path] = params[path] * scale
        for role in roles:
            _columns(params, role, lambda w, scale=scale: w / scale[:, None])
    if "head.weight" in params:
        scale = factors(spec.hidden)
        for path in _names(params, "norm.weight", "norm.bias"):
            params[path] = params[path] * scale
        params["head.weight"] = params["head.weight"] / scale
    # Per layer: MLP units, groups, heads inside them, values, planes.
    for layer in range(layers):
        one = {path: x[layer] for path, x in params.items() if path.startswith("blocks.")}
        take_mlp(one, rng.permutation(spec.mlp), np.ones(spec.mlp))
        if spec.gated:
            scale = factors(spec.mlp)
            _rows(one, "up", lambda w, scale=scale: w * scale)
            _columns(one, "down", lambda w, scale=scale: w / scale)
        # Of heads with biases by distance every one has its own slope.
        groups = np.arange(spec.kv_heads) if spec.alibi is not None else rng.permutation(spec.kv_heads)
        queries = np.concatenate([g * each + rng.permutation(each) for g in groups])
        take_groups(one, spec, groups, queries, np.ones(spec.heads))
        values = np.concatenate([h * d + rng.permutation(d) for h in range(spec.kv_heads)])
        scale = factors(spec.kv_heads * d)
        per_query = np.concatenate(
            [values[(h // each) * d : (h // each + 1) * d] % d + h * d for h in range(spec.heads)]
        )
        wide = np.concatenate([scale[(h // each) * d : (h // each + 1) * d] for h in range(spec.heads)])
        _rows(one, "v", lambda w, values=values, scale=scale: w[..., values] * scale)
        _columns(one, "o", lambda w, per_query=per_query, wide=wide: w[..., per_query] / wide)
        _turn(one, spec, rng)
        for path, x in one.items():
            params[path][layer] = x
    take_stream(params, spec, rng.permutation(spec.hidden), np.ones(spec.hidden))
    return with_spec(model, dataclasses.replace(spec, norm_eps=spec.norm_eps * double**2), params)


def _turn(one: Params, spec: DecoderSpec, rng: np.random.Generator) -> None:
    """Queries and keys of a group through C and C^-T; behind norms of their own only scaled as a whole."""
    each, d = spec.heads // spec.kv_heads, spec.head_dim
    if spec.qk_norm != "none":
        for role, heads in (("q", spec.heads), ("k", spec.kv_heads)):
            scale = np.repeat(np.exp(rng.uniform(-0.7, 0.7, heads)), d)
            _rows(one, role, lambda w, scale=scale: w * scale)
        return
    turning = 0 if spec.rotary.scaling == "none" else spec.rotary.dims(d)
    for g in range(spec.kv_heads):
        c = np.zeros((d, d))
        for a in range(turning // 2):
            b, angle, size = a + turning // 2, rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(-0.7, 0.7))
            c[[a, a, b, b], [a, b, a, b]] = size * np.array(
                [np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)]
            )
        still = np.arange(turning, d)
        c[still, rng.permutation(still)] = rng.choice([-1.0, 1.0], len(still)) * np.exp(
            rng.uniform(-0.7, 0.7, len(still))
        )
        for role, heads, block in (("q", range(g * each, (g + 1) * each), c), ("k", (g,), np.linalg.inv(c).T)):
            for head in heads:
                at = slice(head * d, (head + 1) * d)

                def change(w: np.ndarray, at: slice = at, block: np.ndarray = block) -> np.ndarray:
                    w = w.copy()
                    w[..., at] = w[..., at] @ block.T
                    return w

                _rows(one, role, change)


def widened(model: Model, seed: int = 0, *, stream: bool = True, head_dim: bool = True) -> Model:
    """A copy with more MLP units, one more group, a doubled stream and heads twice as wide."""
    rng, spec, params = np.random.default_rng(seed), model.spec, params_of(model)
    each = spec.heads // spec.kv_heads
    more = np.concatenate([np.arange(spec.mlp), rng.choice(spec.mlp, spec.mlp // 3)])
    take_mlp(params, more, 1.0 / np.bincount(more)[more])
    groups = np.append(np.arange(spec.kv_heads), rng.integers(spec.kv_heads))
    queries = np.concatenate([g * each + np.arange(each) for g in groups])
    take_groups(params, spec, groups, queries, 1.0 / np.bincount(queries)[queries])
    grown = dataclasses.replace(spec, mlp=len(more), heads=len(queries), kv_heads=len(groups))
    if head_dim:
        grown = _wider_heads(params, grown)
    if stream:
        twice = rng.permutation(np.repeat(np.arange(spec.hidden), 2))
        take_stream(params, spec, twice, np.full(2 * spec.hidden, 0.5))
        grown = dataclasses.replace(grown, hidden=2 * spec.hidden)
    return with_spec(model, grown, params)


def _wider_heads(params: Params, spec: DecoderSpec) -> DecoderSpec:
    """Heads of 2d: the frequencies of d are every other one of 2d; values are doubled, the rest of q and k is 0."""
    d, turning = spec.head_dim, spec.rotary.dims(spec.head_dim)
    grown = dataclasses.replace(spec, head_dim=2 * d)
    assert grown.rotary.dims(2 * d) == 2 * turning and spec.rotary.scaling == "default"
    plane = 2 * np.arange(turning // 2)
    where = np.concatenate([plane, turning + plane, 2 * turning + np.arange(d - turning)])

    def spread(heads: int, factor: float, fill: float = 0.0):
        def change(w: np.ndarray) -> np.ndarray:
            wide = np.full((*w.shape[:-1], heads, 2 * d), fill)
            wide[..., where] = w.reshape(*w.shape[:-1], heads, d) * factor
            return wide.reshape(*w.shape[:-1], heads * 2 * d)

        return change

    # Scores are divided by the root of twice the dimension; norms of queries and keys see half the mean square.
    for role, heads in (("q", spec.heads), ("k", spec.kv_heads)):
        _rows(params, role, spread(heads, 2**0.25 if spec.qk_norm == "none" else 1.0))
        if spec.qk_norm != "none":
            path = f"blocks.{role}_norm.weight"
            params[path] = spread(1, 2**-0.25, 1.0)(params[path])
    twice = np.concatenate([np.arange(d), np.arange(d)])
    _rows(params, "v", lambda w: w[..., (np.arange(spec.kv_heads)[:, None] * d + twice).reshape(-1)])
    _columns(params, "o", lambda w: w[..., (np.arange(spec.heads)[:, None] * d + twice).reshape(-1)] / 2)
    return grown


def deepened(model: Model, positions: Sequence[int], seed: int = 0) -> Model:
    """A copy with layers that add nothing, each before the layer of that number."""
    rng, spec, params = np.random.default_rng(seed), model.spec, params_of(model)
    assert not spec.windows and not spec.layer_rotary and not spec.inverse_layer_scale
    for position in sorted(positions, reverse=True):
        for path, x in params.items():
            if path.startswith("blocks."):
                noise = rng.normal(size=x.shape[1:]) * x.std()
                fresh = noise + 1.0 if "norm.weight" in path else noise
                nothing = path.split(".")[1] in WRITES_STREAM
                params[path] = np.insert(x, position, np.zeros_like(noise) if nothing else fresh, axis=0)
    return with_spec(model, dataclasses.replace(spec, layers=spec.layers + len(positions)), params)


def scrambled(model: Model, seed: int = 0, *, keep_layers: Sequence[int] = ()) -> Model:
    """The model with noise for parameters, but for norms of queries and keys and some layers."""
    rng, params = np.random.default_rng(seed), params_of(model)
    for path, x in params.items():
        if path.split(".")[-2] not in ("q_norm", "k_norm"):
            noise = rng.normal(size=x.shape) * max(x.std(), 0.1)
            if path.startswith("blocks."):
                noise[list(keep_layers)] = x[list(keep_layers)]
            params[path] = noise
    return with_spec(model, model.spec, params)
