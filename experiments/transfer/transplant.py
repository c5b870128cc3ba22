"""Unit transplant: units of the source's MLPs take the place of the target's least important ones.

A unit is a key-value memory: what it answers to, and what it then adds to the residual stream. Target layer l takes
units of source layer round(l M / L). On the last tokens of the spans that both models read, ridge regressions say how
to read a source unit's key in the target's MLP input (N, from the target's input to the source's; where the target's
MLP has no gate, the unit's activation itself) and how to write its value (M, from the source's residual stream to the
target's last). Units are scored on half of the calibration texts by what a small gain of theirs would change in the
loss through the read-out alone, relative to their size; the k best of a layer replace its k least active units. Their
gains are solved in closed form on the other half (Gauss-Newton: slopes of the loss and the mean Fisher information of
the read-out). Validation text chooses k and how much of the gains is taken. The control `shrink` takes the target's own
units instead, whose gains then change.
"""

import functools
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from trials import Fused, compare

from tmjax.activations import store
from tmjax.activations.capture import CaptureOptions, capture
from tmjax.checkpoints.model import Model
from tmjax.commands.merge.inputs import Inputs
from tmjax.errors import InputError
from tmjax.evaluate.bits import Scores
from tmjax.models.decoder import bind, init_params
from tmjax.models.layers import ACTIVATIONS
from tmjax.models.spec import DecoderSpec, projections
from tmjax.recipes.merge import Recipe
from tmjax.teacher.features import by_depth, last_tokens, read_out_metric
from tmjax.text.rows import TokenisedDocument, pair_rows
from tmjax.transfer.controls import derangement
from tmjax.typing import Array, Params

ARMS = ("merged", "control:shrink", "control:random_source", "control:shuffled_rows")
UNITS = (1, 4, 16, 64)
STEPS = (0.03, 0.1, 0.3, 1.0)
RIDGE = 0.1
SITES = ("mlp_in", "mlp_hidden", "resid")


@functools.partial(jax.jit, static_argnames="spec")
def slopes(spec: DecoderSpec, params: Params, stream_rd: Array, token_r: Array) -> Array:
    """What the last residual states [R, embed] should change by: minus the slope of their loss; token -1: none."""
    decoder = bind(spec, params)

    def loss(stream: Array, token: Array) -> Array:
        logits = decoder.logits(decoder.norm(stream[None, None]))[0, 0].astype(jnp.float32)
        return jnp.where(token < 0, 0.0, jax.nn.logsumexp(logits) - logits[jnp.maximum(token, 0)])

    return -jax.vmap(jax.grad(loss))(stream_rd, token_r)


def ridge(x_rn: np.ndarray, y_rm: np.ndarray, *, offset: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The map [m, n] and its offset [m] from x to y by ridge regression; the penalty is relative to x's mean square."""
    mean_x, mean_y = (x_rn.mean(axis=0), y_rm.mean(axis=0)) if offset else (0.0 * x_rn[0], 0.0 * y_rm[0])
    x, y = x_rn - mean_x, y_rm - mean_y
    gram = x.T @ x
    solved = np.linalg.solve(gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ y).T
    return solved, mean_y - solved @ mean_x


def next_tokens(documents: list[TokenisedDocument]) -> np.ndarray:
    """The token after the last one of every row; -1 where the text ends."""
    last = [(item.ids, positions[-1]) for item in documents for positions in item.rows]
    return np.array([ids[at + 1] if at + 1 < len(ids) else -1 for ids, at in last])


@dataclass(frozen=True)
class Units:
    """Units of one layer to take: rows of the target's MLP inputs, their biases, values, activations on the rows.

    `keys` by role: (weight [n, embed], bias [n]); `values` [n, embed]; `active` [R, n].
    """

    keys: Mapping[str, tuple[np.ndarray, np.ndarray]]
    values: np.ndarray
    active: np.ndarray


class Transplant:
    """What the arms share: features of both models at the shared rows, slopes of the target's loss, halves."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.inputs = recipe, Inputs(recipe)
        inputs = self.inputs
        tokenizers = [inputs.target_tokenizer, inputs.source_tokenizer]
        limit = recipe.activations.max_tokens
        self.rows, (self.ours, self.theirs) = pair_rows(inputs.texts, tokenizers, pooling="span", max_tokens=limit)
        self.folder = folder
        target = inputs.target
        self.features = self.captured("target", target, target.params, self.ours)
        self.source = self.captured("source", inputs.source, inputs.source.params, self.theirs)
        stream = np.asarray(self.features.site("resid")[-1])
        self.slope = np.asarray(slopes(target.spec, target.params, stream, next_tokens(self.ours)), np.float64)
        self.fisher = read_out_metric(target.spec, target.params, self.features)
        half = self.rows.document % 2 == 0
        self.halves = np.nonzero(half)[0], np.nonzero(~half)[0]
        self.layers = by_depth(target.spec.layers, inputs.source.spec.layers)

    def captured(
        self, name: str, model: Model, params: Params, documents: list[TokenisedDocument]
    ) -> store.Activations:
        """Activations at the last token of every row."""
        path = self.folder / name
        path.mkdir()
        capture(model.spec, params, self.rows, last_tokens(documents), path, CaptureOptions(SITES))
        return store.read(path)

    @functools.cached_property
    def params(self) -> dict[str, np.ndarray]:
        """The target's parameters."""
        return {path: np.asarray(value) for path, value in self.inputs.target.params.items()}

    def _weight(self, model: Model, params: Params, role: str, layer: int) -> np.ndarray:
        return np.asarray(params[projections(model.rows)[role].path], np.float64)[layer]

    def own(self, layer: int) -> Units:
        """The target's own units."""
        target, rows = self.inputs.target, projections(self.inputs.target.rows)
        keys = {}
        for role in ("gate", "up"):
            if role in rows:
                weight = self._weight(target, self.params, role, layer)
                bias = self.params.get(rows[role].path.replace("weight", "bias"))
                keys[role] = weight, np.zeros(len(weight)) if bias is None else np.asarray(bias[layer], np.float64)
        active = np.asarray(self.features.site("mlp_hidden")[layer], np.float64)
        return Units(keys, self._weight(target, self.params, "down", layer).T, active)

    def foreign(self, layer: int, params: Params, features: store.Activations, order: np.ndarray) -> Units:
        """A source's units as the target would read and write them; `order` says which row goes with which."""
        target, source = self.inputs.target, self.inputs.source
        at = self.layers[layer]

        def site(name: str, held: store.Activations, number: int) -> np.ndarray:
            return np.asarray(held.site(name)[number], np.float64)

        x = site("mlp_in", self.features, layer)
        write, _ = ridge(site("resid", features, at)[order], site("resid", self.features, -1))
        values = self._weight(source, params, "down", at).T @ write.T
        act = ACTIVATIONS[target.spec.activation]
        if "gate" in projections(target.rows) and "gate" in projections(source.rows):
            # What has no bias in the target has to do without an offset.
            read, shift = ridge(x, site("mlp_in", features, at)[order], offset=self._biased("up"))
            weights = {role: self._weight(source, params, role, at) for role in ("gate", "up")}
            keys = {role: (weight @ read, weight @ shift) for role, weight in weights.items()}
            active = np.asarray(act(x @ keys["gate"][0].T + keys["gate"][1])) * (x @ keys["up"][0].T + keys["up"][1])
            return Units(keys, values, np.asarray(active, np.float64))
        if "gate" in projections(target.rows):
            raise InputError("unit transplant: the target's MLP has a gate and the source's has none")
        answer = site("mlp_hidden", features, at)[order]
        key, shift = ridge(x, answer, offset=self._biased("up"))
        active = np.asarray(act(x @ key.T + shift), np.float64)
        return Units({"up": (key, shift)}, values, active)

    def _biased(self, role: str) -> bool:
        return projections(self.inputs.target.rows)[role].path.replace("weight", "bias") in self.params

    def arm(self, name: str) -> list[Units]:
        """What an arm takes units from, layer by layer."""
        inputs, order = self.inputs, np.arange(len(self.rows))
        if name == "control:shrink":
            return [self.own(layer) for layer in range(inputs.target.spec.layers)]
        params, features = inputs.source.params, self.source
        if name == "control:random_source":
            params = init_params(inputs.source.spec, jax.random.key(self.recipe.seed))
            features = self.captured(name, inputs.source, params, self.theirs)
        if name == "control:shuffled_rows":
            order = derangement(len(self.rows), self.recipe.seed)
        return [self.foreign(layer, params, features, order) for layer in range(inputs.target.spec.layers)]

    def chosen(self, units: list[Units], most: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per layer: the best units by slope on the first half, best first, and the target's least active ones."""
        found = []
        for layer, item in enumerate(units):
            rows = self.halves[0]
            pull = np.mean(item.active[rows] * (self.slope[rows] @ item.values.T), axis=0)
            size = np.sqrt(np.mean(item.active[rows] ** 2, axis=0)) * np.linalg.norm(item.values, axis=1)
            own = self.own(layer)
            weight = np.mean(own.active[rows] ** 2, axis=0) * np.sum(own.values**2, axis=1)
            score = np.abs(pull) / np.maximum(size, 1e-12)
            found.append((np.argsort(-score)[:most], np.argsort(weight)[:most]))
        return found

    def gains(self, units: list[Units], picked: list[np.ndarray]) -> list[np.ndarray]:
        """Output gains of the picked units of all layers, (H + ridge) gain = slope on the second half."""
        rows = self.halves[1]
        active = np.concatenate([item.active[rows][:, own] for item, own in zip(units, picked, strict=True)], axis=1)
        values = np.concatenate([item.values[own] for item, own in zip(units, picked, strict=True)])
        slope = np.mean(active * (self.slope[rows] @ values.T), axis=0)
        curved = (active.T @ active / len(rows)) * (values @ self.fisher @ values.T)
        held = curved + RIDGE * np.trace(curved) / len(curved) * np.eye(len(curved))
        return np.split(np.linalg.solve(held, slope), np.cumsum([len(own) for own in picked])[:-1])

    def fused(self, units: list[Units], k: int, step: float, own_units: bool) -> dict[str, Any]:
        """Parameters with k units of every layer taken in with `step` times their gains.

        The target's own units (`own_units`) stay where they are and change their gains.
        """
        picked = self.chosen(units, k)
        gains = self.gains(units, [best for best, _ in picked])
        rows = projections(self.inputs.target.rows)
        new = {rows[role].path: self.params[rows[role].path].copy() for role in ("gate", "up", "down") if role in rows}
        biases = {role: rows[role].path.replace("weight", "bias") for role in ("gate", "up") if role in rows}
        new |= {path: self.params[path].copy() for path in biases.values() if path in self.params}
        down = rows["down"].path
        for layer, ((best, least), gain) in enumerate(zip(picked, gains, strict=True)):
            written = (units[layer].values[best] * gain[:, None]).T * step
            if own_units:
                new[down][layer][:, best] += written
                continue
            for role, (key, bias) in units[layer].keys.items():
                new[rows[role].path][layer][least] = key[best]
                if biases[role] in new:
                    new[biases[role]][layer][least] = bias[best]
            new[down][layer][:, least] = written
        return {**self.params, **new}


def run(recipe: Recipe, progress: Callable[[str], None]) -> tuple[dict[str, Scores], dict[str, Any]]:
    """All arms with the same trials on `valid`, measured once on `test`: scores, and what was chosen, by arm."""
    with tempfile.TemporaryDirectory() as folder:
        work = Transplant(recipe, Path(folder))

        def arm(name: str) -> Fused:
            return functools.partial(work.fused, work.arm(name), own_units=name == "control:shrink")

        tried = [{"k": k, "step": step} for k in UNITS for step in STEPS]
        return compare(work.inputs, {name: functools.partial(arm, name) for name in ARMS}, tried, progress)
