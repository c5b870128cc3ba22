"""Rounds of least squares: projections and read-out are solved for the changes of their outputs that a text asks for.

At every position of a text the loss says how an output of a projection should change (minus its gradient there), and
the inputs x say what the projection sees. The change of the weights that makes these outputs change is a ridge
regression, in closed form: dW = G (A + lambda tr(A) / n I)^-1 with G = sum of wanted changes times x^T and A = sum of
x x^T (Benzing 2022 calls this step FOOF). The read-out is solved per token with its own curvature sum p (1 - p). As
elsewhere a solved tensor is given its target's norm, and how much of it is taken is chosen on the validation texts.
Which text asks matters to nothing here: the target's own calibration texts, and one `extra` set that an arm brings.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.activations.batches import bucketed
from tmjax.convert.model import Model
from tmjax.models.decoder import Decoder, bind
from tmjax.models.spec import DecoderSpec
from tmjax.typing import Array, Params

RIDGE = 0.1
#: Tokens that a token of the vocabulary counts as seen before any text.
PRIOR_TOKENS = 30.0
#: What the extra texts weigh beside the calibration texts, token for token on average.
WEIGHTS = (0.0, 0.3, 1.0, 3.0)
#: First steps (read-out, projections) and what they are multiplied by in later trials of a round.
STEPS = (0.12, 0.05)
FACTORS = ((0.5, 1.0), (1.0, 0.5), (0.5, 0.5), (1.5, 1.5))
#: What an arm without extra texts multiplies its steps by where others try weights: as many trials for all.
INSTEAD = (0.25, 0.7, 2.0)
ROUNDS = 12
FAILURES = 2
#: What moves: the read-out alone; also what writes the last residual stream directly; all projections.
REACHES = ("readout", "direct", "blocks")
SITES = ("attn_in", "attn_mix", "mlp_in", "mlp_hidden")


@dataclass(frozen=True)
class Document:
    """Token ids [n], and what should follow each of the first n - 1: token ids [n - 1, K] with weights [n - 1, K]."""

    ids: np.ndarray
    label: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[int], scored_from: int = 0, most: int | None = None) -> "Document":
        """Each token follows the one before it; only tokens after the first `scored_from` count."""
        held = np.asarray(ids[:most], np.int32)
        weight = (np.arange(len(held) - 1) >= scored_from).astype(np.float32)
        return cls(held, held[1:, None], weight[:, None])


def _batches(documents: Sequence[Document], tokens: int) -> Iterator[tuple[np.ndarray, ...]]:
    width = max(document.label.shape[1] for document in documents)
    for batch in bucketed([len(document.ids) for document in documents], batch_tokens=tokens, multiple=1):
        size = max(1, tokens // batch.tokens)  # one shape for all sets of documents, however few are of this length
        ids, length = np.zeros((size, batch.tokens), np.int32), np.ones(size, np.int32)
        label = np.zeros((size, batch.tokens - 1, width), np.int32)
        weight = np.zeros(label.shape, np.float32)
        for slot, number in enumerate(batch.documents):
            held = documents[number]
            n, k = len(held.ids), held.label.shape[1]
            ids[slot, :n], length[slot] = held.ids, n
            label[slot, : n - 1, :k], weight[slot, : n - 1, :k] = held.label, held.weight
        yield ids, length, label, weight


def _log_loss(model: Decoder, hidden: Array, label: Array, weight: Array) -> tuple[Array, Array]:
    """Weighted negative log-likelihood, summed, and all log-probabilities [B, T, V]."""
    logs = jax.nn.log_softmax(model.logits(hidden))
    return -jnp.sum(weight * jnp.take_along_axis(logs, label, axis=-1)), logs


@functools.partial(jax.jit, static_argnames=("spec", "paths", "inputs", "reach"))
def _sums(
    spec: DecoderSpec,
    params: Params,
    batch: tuple[Array, ...],
    paths: tuple[str, ...],
    inputs: tuple[str, ...],
    reach: str,
) -> dict[str, Array]:
    """Sums over a batch: `G:path` and `A:site` of the projections, `G`, `A`, `p` of the read-out, counts of tokens."""
    ids, length, label, weight = batch
    real = (jnp.arange(label.shape[1]) < length[:, None] - 1).astype(jnp.float32)
    sites = (*SITES, "resid") if reach == "direct" else SITES if reach == "blocks" else ()

    def run(moved: Params) -> tuple[Array, tuple[Array, dict[str, Array], Array]]:
        model = bind(spec, {**params, **moved})
        hidden, captured = model.hidden(ids[:, :-1], jnp.float32, sites, lambda x: x)
        loss, logs = _log_loss(model, hidden, label, weight)
        return loss, (hidden, captured, logs)

    moved = {path: params[path] for path in paths} if reach == "blocks" else {}
    (_, (hidden, captured, logs)), gradient = jax.value_and_grad(run, has_aux=True)(moved)
    if reach == "direct":
        model, last = bind(spec, params), captured.pop("resid")[-1]
        wanted = jax.grad(lambda x: _log_loss(model, model.norm(x), label, weight)[0])(last)
        gradient = {
            path: jnp.einsum("bto,lbti->loi", wanted, captured[site]) for path, site in zip(paths, inputs, strict=True)
        }
    mass = jnp.sum(weight, axis=-1, keepdims=True)
    p = jnp.exp(logs)
    width = hidden.shape[-1]
    rows = (weight[..., None] * hidden[:, :, None]).reshape(-1, width)
    readout = jnp.einsum("btv,bte->ve", mass * p, hidden).at[label.reshape(-1)].add(-rows)
    found = {
        "tokens": jnp.sum(mass),
        "real": jnp.sum(real),
        "G": readout,
        "A": jnp.einsum("bte,btf->ef", mass * hidden, hidden),
        "p": jnp.sum(mass * p * (1 - p), axis=(0, 1)),
    }
    found |= {f"G:{path}": value for path, value in gradient.items()}
    for site, x in captured.items():
        x = x * real[:, :, None]
        found[f"A:{site}"] = jnp.einsum("lbti,lbtj->lij", x, x)
    return found


@dataclass(frozen=True)
class Operator:
    """What is solved of a target model: `reach` as in `REACHES`."""

    target: Model
    reach: str = "blocks"
    batch_tokens: int = 4096

    @property
    def readout(self) -> str:
        """Path of the read-out, which may be the embeddings too."""
        return "embed.weight" if self.target.spec.tied_embeddings else "head.weight"

    @property
    def projections(self) -> dict[str, str]:
        """Input site of every projection that moves, by path."""
        rows = {"readout": (), "direct": ("o", "down"), "blocks": tuple(self.target.projections)}[self.reach]
        return {row.path: row.input_site for role, row in self.target.projections.items() if role in rows}

    def sums(self, params: Params, documents: Sequence[Document]) -> dict[str, Array]:
        """What the solve needs of the documents under these parameters, per token."""
        told = tuple(self.projections), tuple(self.projections.values()), self.reach
        total: dict[str, Array] | None = None
        for batch in _batches(documents, self.batch_tokens):
            found = _sums(self.target.spec, params, batch, *told)
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        assert total is not None
        scored = total.pop("tokens"), total.pop("real")
        scale = {key: scored[1] if key.startswith("A:") else scored[0] for key in total}
        return {key: value / scale[key] for key, value in total.items()} | {"tokens": scored[0]}

    def direction(self, params: Params, sums: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """The solved changes, of the read-out and of the projections, each with the norm of what it changes."""
        gram = _ridged(sums["A"])
        seen = sums["p"] + PRIOR_TOKENS / sums["tokens"]
        readout = {self.readout: -_right_solve(gram, sums["G"]) / seen[:, None]}
        inner = {
            path: -_right_solve(_ridged(sums[f"A:{site}"]), sums[f"G:{path}"])
            for path, site in self.projections.items()
        }
        return tuple({path: _as_large(x, params[path]) for path, x in part.items()} for part in (readout, inner))

    def moved(self, params: Params, sums: Mapping[str, Array], steps: tuple[float, float]) -> Params:
        """The parameters after steps of these sizes (read-out, projections) in the solved direction."""
        changes = [
            (path, step * change)
            for part, step in zip(self.direction(params, sums), steps, strict=True)
            for path, change in part.items()
        ]
        return {**params, **{path: params[path] + change for path, change in changes}}


def _ridged(gram: Array) -> Array:
    n = gram.shape[-1]
    mean = jnp.trace(gram, axis1=-2, axis2=-1) / n
    return gram + RIDGE * mean[..., None, None] * jnp.eye(n)


def _right_solve(gram: Array, values: Array) -> Array:
    """values gram^-1 for symmetric gram [..., n, n], values [..., out, n]."""
    return jnp.swapaxes(jnp.linalg.solve(gram, jnp.swapaxes(values, -1, -2)), -1, -2)


def _as_large(change: Array, weight: Array) -> Array:
    """The change, each layer's matrix with the norm of the weight's."""
    size, now = (jnp.linalg.norm(x.astype(jnp.float32), axis=(-2, -1), keepdims=True) for x in (weight, change))
    return change * size / jnp.maximum(now, 1e-30)


def _mixed(own: Mapping[str, Array], extra: Mapping[str, Array] | None, weight: float) -> dict[str, Array]:
    if extra is None or weight == 0:
        return dict(own)
    return {key: own[key] + weight * extra[key] for key in own}


@dataclass(frozen=True)
class Climbed:
    """What the rounds came to: parameters, validation bits per byte of every round's best, what it chose, trials."""

    params: Params
    losses: list[float]
    chosen: list[dict[str, float]]
    trials: int


def climb(
    operator: Operator,
    own: Sequence[Document],
    extra: Sequence[Sequence[Document]],
    loss: Callable[[Params], float],
    *,
    rounds: int,
    progress: Callable[[str], None] = lambda text: None,
) -> Climbed:
    """At most `rounds` solves; each tries the same weights of the extra texts and the same steps on `loss`.

    `extra` are sets of documents that take turns; an arm without any tries as many other steps instead. A round without
    a better trial halves the steps; after `FAILURES` of them in a row it ends.
    """
    params, steps, failures = dict(operator.target.params), STEPS, 0
    losses, chosen, trials = [loss(params)], [], 0
    for number in range(rounds):
        sums = operator.sums(params, own)
        more = operator.sums(params, extra[number % len(extra)]) if extra else None

        wanted = [(weight, steps) for weight in WEIGHTS]
        if not extra:
            wanted = [(0.0, (a * steps[0], a * steps[1])) for a in (1.0, *INSTEAD)]
        tried = [(loss(operator.moved(params, _mixed(sums, more, w), s)), w, s) for w, s in wanted]
        _, weight, taken = min(tried)
        mixed = _mixed(sums, more, weight)
        for a, b in FACTORS:
            step = a * taken[0], b * taken[1]
            tried.append((loss(operator.moved(params, mixed, step)), weight, step))
        trials += len(tried)
        best = min(tried)
        if best[0] < losses[-1]:
            params, steps, failures = operator.moved(params, _mixed(sums, more, best[1]), best[2]), best[2], 0
            losses.append(best[0])
            chosen.append({"weight": best[1], "readout": best[2][0], "projections": best[2][1]})
            progress(f"round {number + 1}: {best[0]:.4f} {chosen[-1]}")
        else:
            steps, failures = (steps[0] / 2, steps[1] / 2), failures + 1
            if failures == FAILURES:
                break
    return Climbed(params, losses, chosen, trials)
