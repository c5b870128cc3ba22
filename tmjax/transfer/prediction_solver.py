"""Rounds of ridge regressions toward prediction targets: the true next tokens and the teacher probabilities.

The targets of a position of the calibration texts are the true next token, and the source's probabilities wherever both
models have read the same text. The residuals of the targets give the changes y of the logits and of the last residual
stream. The change of a projection that maps its inputs x to the changes y is a ridge regression in closed form,

    dW = Y (A + lambda tr(A) / n I)^-1,  Y = mean of y x^T,  A = mean of x x^T,

as in FOOF (Benzing, 2022). The read-out is solved per token with its own curvature, the mean of p (1 - p). A projection
that writes the residual stream is solved as if no block followed it, so nothing is propagated back through a block.
The step sizes and the weight of the teacher probabilities are chosen on validation text. There is no optimiser; a round
is one damped Gauss-Newton step of the read-out and of the last block.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from pydantic import Field

from tmjax import backend
from tmjax.activations.joined import Joined
from tmjax.errors import InputError, NonFiniteError
from tmjax.models.spec import DecoderSpec, ParamSpec, projections
from tmjax.recipes.base import Positive, PositiveFloat, Section
from tmjax.sharding.hosts import to_host
from tmjax.sharding.mesh import Layout
from tmjax.transfer.least_squares.prediction_sums import added, means
from tmjax.transfer.least_squares.ridge_systems import TOLERANCE, right_solve
from tmjax.transfer.least_squares.steps import moved
from tmjax.transfer.least_squares.sum_program import SumProgram, Sums
from tmjax.typing import Array, ArrayLike, Params

#: Weights tried for the teacher probabilities, relative to the true next tokens.
WEIGHTS = (0.0, 0.3, 1.0, 3.0)
#: Step factors that an arm without a source tries in place of weights, so that all arms have as many trials.
STEPS_FOR_WEIGHTS = (1.0, 0.25, 0.7, 2.0)
#: Initial steps (read-out, projections), and the factors of the later trials of a round.
STEPS = (0.12, 0.05)
FACTORS = ((0.5, 1.0), (1.0, 0.5), (1.5, 1.5))
#: Projections that write the residual stream.
WRITERS = ("o", "down")


class PredictionTargets(NamedTuple):
    """A batch of texts, joined in rows, and the source's probabilities of their next tokens.

    `own`: whether the texts' own next tokens are targets too. At every token of the rows [B, T], `token` [B, T, K]
    int32 and their probabilities `weight` [B, T, K] float32, zero where the source has no distribution.
    """

    texts: Joined
    own: bool
    token: ArrayLike
    weight: ArrayLike


def finite(loss: Callable[[Params], float], params: Params) -> float:
    """Returns the loss, or infinity if it is not finite: too large a step loses its trial and does not end a merge."""
    try:
        value = loss(params)
    except NonFiniteError:
        return math.inf
    return value if math.isfinite(value) else math.inf


class _Trial(NamedTuple):
    """Validation bits per byte at a weight of the teacher probabilities and steps (read-out, projections)."""

    loss: float
    weight: float
    steps: tuple[float, float]


@dataclass(frozen=True)
class Solved:
    """Result of the rounds: parameters, validation bits per byte before and after each, choices, number of trials.

    `positions`: of the true tokens, of the teacher (by its probability), of all texts.
    """

    params: Params
    losses: list[float]
    chosen: list[dict[str, float]]
    trials: int
    positions: tuple[float, ...]

    @property
    def from_source(self) -> bool:
        """Whether any accepted round gave the teacher probabilities a weight."""
        return any(item["weight"] > 0 for item in self.chosen)


class PredictionOptions(Section):
    """Options of the operator `predictions`."""

    scope: Annotated[
        Literal["readout", "direct"],
        Field(
            description="`readout` solves for the read-out alone, `direct` also for the output projections of "
            "attention and MLP of every layer, each as if nothing came after it."
        ),
    ] = "direct"
    rounds: Annotated[Positive, Field(description="Largest number of rounds, in each of which all is solved.")] = 20
    ridge: Annotated[PositiveFloat, Field(description="Penalty, in units of the inputs' mean square.")] = 0.1
    prior_tokens: Annotated[
        PositiveFloat, Field(description="Tokens that each token of the vocabulary counts as seen before any text.")
    ] = 30.0
    patience: Annotated[Positive, Field(description="Rounds without a better trial that end the solve.")] = 2
    generated_texts: Annotated[
        int,
        Field(ge=0, description="Texts that the source generates, read beside the calibration texts; 0: none."),
    ] = 3000
    tokens: Annotated[Positive, Field(description="Longest generated text, in tokens of the source.")] = 96
    examples: Annotated[
        int | None,
        Field(
            ge=0,
            description="Calibration texts that stand before the beginning of every generated text, a line each: a "
            "general model stays with their subject and form. null: 3 for a source that begins or ends the calibration "
            "texts by another convention, else none.",
        ),
    ] = None
    trust: Annotated[
        PositiveFloat | None,
        Field(description="Largest change of a tensor from where the solve began, as a part of its norm."),
    ] = None


@dataclass(frozen=True)
class Solver:
    """Solves a model's read-out, and with `scope: direct` the projections that write its residual stream.

    `start` are the parameters that the trust cap is relative to. `known` [V] bool marks the rows of the read-out that
    are tokens, if some are not; the other rows stay unchanged.
    """

    spec: DecoderSpec
    rows: tuple[ParamSpec, ...]
    start: Params
    options: PredictionOptions
    dtype: jnp.dtype = jnp.float32
    layout: Layout = field(default_factory=Layout)
    known: np.ndarray | None = None

    @property
    def readout(self) -> str:
        """Path of the read-out; with tied embeddings, that of the embeddings."""
        return "embed.weight" if self.spec.tied_embeddings else "head.weight"

    @property
    def writers(self) -> tuple[tuple[str, str], ...]:
        """(path, input site) of the projections that change."""
        rows = projections(self.rows)
        roles = WRITERS if self.options.scope == "direct" else ()
        return tuple((rows[role].path, rows[role].input_site) for role in roles if role in rows)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all tensors that change."""
        return (self.readout, *(path for path, _ in self.writers))

    @functools.cached_property
    def placements(self) -> dict[str, NamedSharding]:
        """Layouts of the tensors that change, by path; empty on one device."""
        rows = {row.path: row for row in self.rows}
        # A read-out without a row of its own is laid out as the embeddings are.
        specs = {path: rows.get(path, rows["embed.weight"]) for path in self.paths}
        places = {path: self.layout.place(row, row.stacked_shape(self.spec)) for path, row in specs.items()}
        return {path: place for path, place in places.items() if place is not None}

    @functools.cached_property
    def program(self) -> SumProgram:
        """The static part of the sums."""
        rows = {row.path: row for row in self.rows}
        shapes = tuple(rows[path].stacked_shape(self.spec) for path, _ in self.writers)
        placements = tuple(self.placements.values())
        return SumProgram(
            self.spec, self.readout, self.writers, shapes, jnp.dtype(self.dtype), self.layout.mesh, placements
        )

    def sums(self, params: Params, batches: Sequence[PredictionTargets]) -> Sums:
        """Computes the means over the texts that the solve needs, under these parameters."""
        total, place = self.program.zeros(), self.layout.place_batch
        for batch in batches:
            arrays = Joined(*map(place, batch.texts)), place(batch.token), place(batch.weight)
            total = jax.block_until_ready(added(self.program, total, params, *arrays, batch.own))
        return jax.block_until_ready(means(total))

    def directions(self, sums: Sums) -> dict[str, Array]:
        """Solves for the changes by path, [2, ...]: for the true tokens, for the teacher probabilities.

        The sums' right-hand sides are donated. Raises InputError if a solution does not satisfy its equations.
        """
        count, vocab = sums.count[2], self.spec.vocab
        seen = sums.curvature[:vocab] + self.options.prior_tokens / count
        readout = self._solved(sums.gram, sums.cross, self.readout)[:, :vocab] / seen[:, None]
        if self.known is not None:
            readout = jnp.where(self.known[:, None], readout, 0.0)
        changes = {self.readout: self._placed(readout, self.readout)}
        for path, site in self.writers:
            changes[path] = self._placed(self._solved(sums.grams[site], sums.inner[path], path), path)
        return changes

    def _solved(self, gram: Array, values: Array, path: str) -> Array:
        # One at a time: several LAPACK calls in one program can lock up the thread pool of XLA's CPU backend.
        cpu, mesh = backend.platform() == "cpu", self.layout.mesh
        if cpu and mesh is not None:
            # Whole on every simulated device beforehand: devices that wait for others take the threads LAPACK needs.
            whole = NamedSharding(mesh, PartitionSpec())
            gram, values = jax.block_until_ready(jax.device_put((gram, values), whole))
        x, error = jax.block_until_ready(right_solve(gram, values, self.options.ridge, mesh, cpu))
        if (error := float(np.max(to_host(error)))) > TOLERANCE:
            raise InputError(
                f"the operator predictions cannot solve for {path}: a residual of {error:.1e}, above {TOLERANCE};"
                " raise its ridge"
            )
        return x

    def _placed(self, x: Array, path: str) -> Array:
        """Changes [2, ...] laid out like the tensor that they change."""
        place = self.placements.get(path)
        return x if place is None else jax.device_put(x, NamedSharding(place.mesh, PartitionSpec(None, *place.spec)))

    def moved(
        self, params: Params, directions: dict[str, Array], weight: float, steps: tuple[float, float]
    ) -> dict[str, ArrayLike]:
        """Returns the parameters after steps of these sizes (read-out, projections)."""
        sizes = {path: jnp.float32(steps[path != self.readout]) for path in self.paths}
        now, first = ({path: each[path] for path in self.paths} for each in (params, self.start))
        how = self.options.trust, tuple(self.placements.items())
        return {**params, **moved(now, first, directions, sizes, jnp.float32(weight), *how)}

    def _tried(
        self,
        params: Params,
        directions: dict[str, Array],
        steps: tuple[float, float],
        loss: Callable[[Params], float],
        *,
        with_source: bool,
    ) -> list[_Trial]:
        """Tries all weights at these steps, then other steps at the best weight; without a source, steps for weights.

        Weights are tried in every round: the first rounds often choose weight 0, later ones a positive weight.
        """

        def attempt(weight: float, step: tuple[float, float]) -> _Trial:
            return _Trial(finite(loss, self.moved(params, directions, weight, step)), weight, step)

        if with_source:
            tried = [attempt(other, steps) for other in WEIGHTS]
        else:
            tried = [attempt(0.0, (a * steps[0], a * steps[1])) for a in STEPS_FOR_WEIGHTS]
        _, weight, taken = min(tried)
        return tried + [attempt(weight, (a * taken[0], b * taken[1])) for a, b in FACTORS]

    def solve(
        self,
        params: Params,
        batches: Sequence[PredictionTargets],
        loss: Callable[[Params], float],
        progress: Callable[[int, int], None] = lambda done, total: None,
        screen: Callable[[Params], float] | None = None,
    ) -> Solved:
        """Solves at most `rounds` times; every arm has as many trials of weights and steps, compared by `loss`.

        With a `screen`, a cheaper loss, the trials of a round are compared by it and only the best is scored by `loss`.
        A round without a better trial halves the steps. Raises NonFiniteError if no trial of a round has a finite loss.
        """
        params = {**params, **{path: jnp.asarray(params[path], jnp.float32) for path in self.paths}}
        with_source = any(np.any(batch.weight) for batch in batches)
        steps, failures, trials = STEPS, 0, 0
        losses, chosen, positions = [loss(params)], [], ()
        for number in range(self.options.rounds):
            sums = self.sums(params, batches)
            positions = tuple(float(x) for x in to_host(sums.count))
            directions = self.directions(sums)
            del sums
            tried = self._tried(params, directions, steps, screen or loss, with_source=with_source)
            trials += len(tried)
            best = min(tried)
            if math.isinf(best.loss):
                raise NonFiniteError("the predictions of the model that is solved for are not finite")
            changed = self.moved(params, directions, best.weight, best.steps)
            if screen is not None:
                best = best._replace(loss=finite(loss, changed))
            if best.loss < losses[-1]:
                params = changed
                steps, failures = best.steps, 0
                losses.append(best.loss)
                chosen.append({"weight": best.weight, "readout": best.steps[0], "projections": best.steps[1]})
            else:
                steps, failures = (steps[0] / 2, steps[1] / 2), failures + 1
            progress(number + 1, self.options.rounds)
            if failures == self.options.patience:
                break
        progress(self.options.rounds, self.options.rounds)
        return Solved(params, losses, chosen, trials, positions)
