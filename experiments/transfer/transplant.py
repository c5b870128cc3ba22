"""Unit transplant: units of the source's MLPs take the place of the target's least important ones.

An operator in a file of its own, outside the package. A recipe names it by its place:

    operators:
      - experiments/transfer/transplant.py:UnitTransplant: {units: [1, 4, 16, 64]}

A unit is a key-value memory: a key that it responds to, and a value that it then adds to the residual stream. Target
layer l takes units of source layer round(l M / L). On the last tokens of the spans that both models read, ridge
regressions map a source unit's key to the target's MLP input (N, from the target's input to the source's; where the
target's MLP has no gate, the unit's activation itself) and its value to the target's residual stream (M, from the
source's residual stream to the target's last). Units are scored on half of the calibration texts by the change of the
loss, through the read-out alone, under a small gain of theirs, relative to their size; the k best of a layer replace
its k least active units. Their gains are solved in closed form on the other half (Gauss-Newton: slopes of the loss and
the mean Fisher information of the read-out). Validation text chooses k and the share of the gains that is taken, or
that nothing changes. Where the source contributes nothing, gains of the target's own units are solved and tried
instead, with the same budget.
"""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from tmjax.activations.store import Activations
from tmjax.checkpoints.model import Model
from tmjax.errors import InputError
from tmjax.models.decoder import bind
from tmjax.models.layers import ACTIVATIONS
from tmjax.models.spec import DecoderSpec, biases
from tmjax.recipes.base import Positive, PositiveFloat, Section
from tmjax.sharding.hosts import to_host
from tmjax.teacher.span_features import by_depth, read_out_metric
from tmjax.text.rows import TokenisedDocument
from tmjax.transfer.contribution import Applied, Context, Shape
from tmjax.transfer.source_view import PairedFeatures, SourceView
from tmjax.transfer.update_table import Table, changes
from tmjax.typing import Array, Params

#: Sites whose features are needed.
SITES = ("mlp_in", "mlp_hidden", "resid")


class UnitTransplantOptions(Section):
    """Options of the operator `unit_transplant`."""

    units: Annotated[
        tuple[Positive, ...], Field(min_length=1, description="Numbers of units per layer that are tried.")
    ] = (1, 4, 16, 64)
    steps: Annotated[
        tuple[PositiveFloat, ...], Field(min_length=1, description="Shares of the solved gains that are tried.")
    ] = (0.03, 0.1, 0.3, 1.0)
    ridge: Annotated[
        PositiveFloat, Field(description="Penalty of maps and gains, in units of their inputs' mean square.")
    ] = 0.1


@functools.partial(jax.jit, static_argnames="spec")
def slopes(spec: DecoderSpec, params: Params, states_rd: Array, token_r: Array) -> Array:
    """Computes minus the slope of the loss in the last residual states [R, embed]; token -1: none."""
    decoder = bind(spec, params)

    def loss(state: Array, token: Array) -> Array:
        logits = decoder.logits(decoder.norm(state[None, None]))[0, 0].astype(jnp.float32)
        return jnp.where(token < 0, 0.0, jax.nn.logsumexp(logits) - logits[jnp.maximum(token, 0)])

    return -jax.vmap(jax.grad(loss))(states_rd, token_r)


def ridge_map(
    x_rn: np.ndarray, y_rm: np.ndarray, penalty: float, *, offset: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Fits a map [m, n] and its offset [m] from x to y; the penalty is relative to x's mean square."""
    mean_x, mean_y = (x_rn.mean(axis=0), y_rm.mean(axis=0)) if offset else (0.0 * x_rn[0], 0.0 * y_rm[0])
    x, y = x_rn - mean_x, y_rm - mean_y
    gram = x.T @ x
    solved = np.linalg.solve(gram + penalty * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ y).T
    return solved, mean_y - solved @ mean_x


def next_tokens(documents: list[TokenisedDocument]) -> np.ndarray:
    """Returns the token after the last one of every row; -1 where the text ends."""
    last = [(item.ids, positions[-1]) for item in documents for positions in item.rows]
    return np.array([ids[at + 1] if at + 1 < len(ids) else -1 for ids, at in last])


def _layer(features: Activations, site: str, layer: int) -> np.ndarray:
    return np.asarray(features.layers_of(site)[layer], np.float64)


@dataclass(frozen=True)
class Units:
    """Units of one layer.

    Attributes:
        keys: By role, weight [n, embed] and bias [n] that read the target's MLP input.
        values: What each adds to the target's residual stream [n, embed].
        active: Their activations on the rows [R, n].
    """

    keys: Mapping[str, tuple[np.ndarray, np.ndarray]]
    values: np.ndarray
    active: np.ndarray


def own_units(target: Model, params: Params, features: Activations, layer: int) -> Units:
    """Returns the target's units of a layer."""
    rows, offsets, keys = target.projections, biases(target.rows), {}
    for role in ("gate", "up"):
        if role in rows:
            weight = np.asarray(params[rows[role].path][layer], np.float64)
            bias = np.asarray(params[offsets[role].path][layer], np.float64) if role in offsets else None
            keys[role] = weight, np.zeros(len(weight)) if bias is None else bias
    values = np.asarray(params[rows["down"].path][layer], np.float64).T
    return Units(keys, values, _layer(features, "mlp_hidden", layer))


def mapped_units(target: Model, source: Model, features: PairedFeatures, layer: int, penalty: float) -> Units:
    """Maps the units of a source layer to keys and values of a target layer.

    Raises:
        InputError: The target's MLP has a gate and the source's has none.
    """
    at = by_depth(target.spec.layers, source.spec.layers)[layer]

    def weight(role: str) -> np.ndarray:
        return np.asarray(to_host(source.params[source.projections[role].path]), np.float64)[at]

    x, offset = _layer(features.target, "mlp_in", layer), "up" in biases(target.rows)
    write, _ = ridge_map(_layer(features.source, "resid", at), _layer(features.target, "resid", -1), penalty)
    values = weight("down").T @ write.T
    act = ACTIVATIONS[target.spec.activation]
    if "gate" in target.projections and "gate" in source.projections:
        # A target without biases has to do without an offset.
        read, shift = ridge_map(x, _layer(features.source, "mlp_in", at), penalty, offset=offset)
        weights = {role: weight(role) for role in ("gate", "up")}
        keys = {role: (w @ read, w @ shift) for role, w in weights.items()}
        active = np.asarray(act(x @ keys["gate"][0].T + keys["gate"][1])) * (x @ keys["up"][0].T + keys["up"][1])
        return Units(keys, values, np.asarray(active, np.float64))
    if "gate" in target.projections:
        raise InputError("unit transplant: the target's MLP has a gate and the source's has none")
    key, shift = ridge_map(x, _layer(features.source, "mlp_hidden", at), penalty, offset=offset)
    active = np.asarray(act(x @ key.T + shift), np.float64)
    return Units({"up": (key, shift)}, values, active)


@dataclass(frozen=True)
class Transplant:
    """Units to be taken in, and the sums by which they are chosen and their gains solved.

    Attributes:
        target: The target.
        params: Its parameters before, on the host.
        own: Its own units by layer.
        units: Units by layer that gains are solved for: mapped ones, or its own.
        slope: Minus the slope of its loss in the last residual states [R, embed].
        fisher: Mean Fisher information of its read-out [embed, embed].
        halves: Rows by which units are chosen, and rows by which gains are solved.
        penalty: Penalty of the gains.
    """

    target: Model
    params: Params
    own: list[Units]
    units: list[Units]
    slope: np.ndarray
    fisher: np.ndarray
    halves: tuple[np.ndarray, np.ndarray]
    penalty: float

    def chosen(self, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns by layer the best units by slope, best first, and the target's least active ones."""
        result, rows = [], self.halves[0]
        for item, own in zip(self.units, self.own, strict=True):
            pull = np.mean(item.active[rows] * (self.slope[rows] @ item.values.T), axis=0)
            size = np.sqrt(np.mean(item.active[rows] ** 2, axis=0)) * np.linalg.norm(item.values, axis=1)
            weight = np.mean(own.active[rows] ** 2, axis=0) * np.sum(own.values**2, axis=1)
            score = np.abs(pull) / np.maximum(size, 1e-12)
            result.append((np.argsort(-score)[:count], np.argsort(weight)[:count]))
        return result

    def gains(self, picked: list[np.ndarray]) -> list[np.ndarray]:
        """Solves (H + ridge) gain = slope for the output gains of the picked units of all layers."""
        rows = self.halves[1]
        active = np.concatenate([item.active[rows][:, best] for item, best in zip(self.units, picked, strict=True)], 1)
        values = np.concatenate([item.values[best] for item, best in zip(self.units, picked, strict=True)])
        slope = np.mean(active * (self.slope[rows] @ values.T), axis=0)
        curved = (active.T @ active / len(rows)) * (values @ self.fisher @ values.T)
        left = curved + self.penalty * np.trace(curved) / len(curved) * np.eye(len(curved))
        return np.split(np.linalg.solve(left, slope), np.cumsum([len(best) for best in picked])[:-1])

    def fused(self, count: int, step: float, contribution: float) -> dict[str, np.ndarray]:
        """Returns the changed parameters: `count` units of every layer, with `step` times their gains.

        The target's own units, without a contribution of the source, stay in their places and change their gains.
        """
        picked = self.chosen(count)
        gains = self.gains([best for best, _ in picked])
        rows, offsets = self.target.projections, biases(self.target.rows)
        roles = ("down",) if contribution == 0 else (*self.units[0].keys, "down")
        paths = [rows[role].path for role in roles]
        paths += [offsets[role].path for role in roles if role in offsets and role != "down"]
        new = {path: np.array(self.params[path]) for path in paths}
        down = rows["down"].path
        for layer, ((best, least), gain) in enumerate(zip(picked, gains, strict=True)):
            written = (self.units[layer].values[best] * gain[:, None]).T * step
            if contribution == 0:
                new[down][layer][:, best] += written
                continue
            for role, (key, bias) in self.units[layer].keys.items():
                new[rows[role].path][layer][least] = key[best]
                if role in offsets:
                    new[offsets[role].path][layer][least] = bias[best]
            new[down][layer][:, least] = contribution * written
        return new


def prepare(params: Params, source: SourceView, options: UnitTransplantOptions, target: Model) -> Transplant:
    """Maps the source's units and measures the slopes of the target's loss."""
    features, spec = source.features(SITES), target.spec
    layers = range(spec.layers)
    kept = [row.path for row in target.rows if row.role in ("gate", "up", "down")]
    params = {**params, **{path: to_host(params[path]) for path in kept if path in params}}
    states = features.target.layers_of("resid")[spec.layers - 1]
    own = [own_units(target, params, features.target, layer) for layer in layers]
    units = own
    if source.contribution != 0:
        units = [mapped_units(target, source.model, features, layer, options.ridge) for layer in layers]
    half = features.target.rows.document % 2 == 0
    return Transplant(
        target,
        params,
        own,
        units,
        np.asarray(slopes(spec, params, states, next_tokens(features.documents)), np.float64),
        read_out_metric(spec, params, features.target),
        (np.nonzero(half)[0], np.nonzero(~half)[0]),
        options.ridge,
    )


def update_rows(target: Model, before: Params, after: Params, contribution: float) -> Table:
    """Returns the rows of the update table: the change of every tensor, and how much of it is the source's."""
    measured = changes(target.spec, target.rows, target.params, before, after)
    return {
        name: {"effective_update": whole, "unit_transplant": step, "source_part": contribution * step}
        for name, (step, whole) in measured.items()
    }


class UnitTransplant:
    """Units of the source's MLPs in the places of the target's least active ones."""

    name: ClassVar[str] = "unit_transplant"
    options: ClassVar[type[Section]] = UnitTransplantOptions
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    chooses: ClassVar[bool] = True

    def apply(self, params: Params, source: SourceView, options: UnitTransplantOptions, context: Context) -> Applied:
        """Takes in units as validation text chooses; see `tmjax.transfer.operator.Operator`."""
        assert context.loss is not None
        target, loss, share = context.target, context.loss, source.contribution
        work = prepare(params, source, options, target)
        tried = [{"units": count, "step": step} for count, step in itertools.product(options.units, options.steps)]

        def moved(trial: Mapping[str, float]) -> Params:
            return {**params, **work.fused(int(trial["units"]), trial["step"], share)}

        before, losses = loss(params), []
        for trial in tried:
            losses.append((context.screen or loss)(moved(trial)))
            context.progress(len(losses), len(tried))
        best, number = min((value, number) for number, value in enumerate(losses))
        result = moved(tried[number])
        after = best if context.screen is None else loss(result)
        facts = {"chosen": None, "valid_bits_per_byte": [before, min(before, after)], "trials": len(tried)}
        if after >= before:
            return Applied(params, facts)
        table = update_rows(target, params, result, share)
        return Applied(result, facts | {"chosen": tried[number]}, lambda final: table)

    def memory(self, target: Shape, source: Shape, options: UnitTransplantOptions, batch_tokens: int) -> int:
        """Estimates keys, values and changed weights of all layers, without activations, which depend on the texts."""
        layers, width = target.spec.layers, target.spec.hidden
        return layers * width * (8 * 3 * (source.spec.mlp + target.spec.mlp) + 4 * 3 * target.spec.mlp)


OPERATOR = UnitTransplant()
