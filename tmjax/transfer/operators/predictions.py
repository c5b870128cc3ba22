"""Predictions: after the operators before it, the target is solved for toward the source's predictions of its tokens.

The prediction targets are the true next tokens of the calibration texts, and the source's probabilities where both
models have read the same text. How weights are solved for is in `transfer.prediction_solver`.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from tmjax.activations.joined import Joined, join
from tmjax.checkpoints.model import Model
from tmjax.errors import InputError
from tmjax.models.spec import DecoderSpec
from tmjax.recipes.base import Section
from tmjax.sharding.hosts import to_host
from tmjax.sharding.mesh import Layout
from tmjax.teacher.probabilities import Search, TeacherProbabilities
from tmjax.transfer.contribution import Applied, Context, Shape
from tmjax.transfer.least_squares.prediction_sums import batch_tokens, logits_at_once
from tmjax.transfer.prediction_solver import PredictionOptions, PredictionTargets, Solved, Solver
from tmjax.transfer.source_view import SourceView, TeacherData
from tmjax.transfer.update_table import Table
from tmjax.typing import Params


def prediction_targets(
    spec: DecoderSpec, data: TeacherData, tokens: int, layout: Layout | None = None
) -> list[PredictionTargets]:
    """Joins texts in rows and attaches the source's probabilities to their tokens.

    Args:
        spec: Architecture of the target.
        data: Texts and probabilities.
        tokens: Tokens per batch, as an evaluation would take; see `prediction_sums.batch_tokens`.
        layout: Devices.

    Returns:
        Batches of the calibration texts, whose own next tokens are targets too, then of the generated ones.
    """
    layout = layout or Layout()
    limit = batch_tokens(spec.vocab, tokens, layout.devices)
    batches = []
    for first, part in ((0, data.documents[: data.given]), (data.given, data.documents[data.given :])):
        for batch in join(spec, list(part), limit, layout):
            batches.append(PredictionTargets(batch, first == 0, *_attached(data.probabilities, batch, first)))
    return batches


def _attached(probabilities: TeacherProbabilities | None, batch: Joined, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and probabilities [B, T, K] at the tokens of a batch, whose texts count from `first`."""
    keep = Search().keep if probabilities is None else probabilities.ids.shape[1]
    ids, weight = (np.zeros((*batch.ids.shape, keep), kind) for kind in (np.int32, np.float32))
    if probabilities is not None:
        # Rows of the probabilities are in the order of documents and of positions: found by one key for both.
        span = 1 + int(max(probabilities.position.max(), batch.place.max()))
        keys = probabilities.document.astype(np.int64) * span + probabilities.position
        asked = (batch.text.astype(np.int64) + first) * span + batch.place
        row = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
        known = (batch.text >= 0) & (keys[row] == asked)
        ids[known], weight[known] = probabilities.ids[row[known]], probabilities.weight[row[known]]
    return ids, weight


def solved_rows(target: Model, before: Params, solved: Solved, paths: tuple[str, ...]) -> Table:
    """Makes the rows of the update table for everything that was solved.

    Args:
        target: The target before the first operator.
        before: Parameters before this operator.
        solved: Result of the rounds.
        paths: Paths of the parameters that were solved.

    Returns:
        Columns by Hugging Face name: `solved` is the norm of the change over the target's; `source_solved` is the same
        if a round took the source's predictions, and 0 if all took the true tokens alone.
    """
    specs, table = {row.path: row for row in target.rows}, {}
    for path in paths:
        names = specs[path].names(target.spec)
        arrays = (np.asarray(to_host(x[path]), np.float64) for x in (target.params, before, solved.params))
        old, previous, new = (x.reshape(len(names), -1) for x in arrays)
        size = np.maximum(np.linalg.norm(old, axis=1), 1e-30)
        change, whole = np.linalg.norm(new - previous, axis=1) / size, np.linalg.norm(new - old, axis=1) / size
        for layer, name in enumerate(names):
            table[name] = {
                "effective_update": float(whole[layer]),
                "solved": float(change[layer]),
                "source_solved": float(change[layer]) if solved.from_source else 0.0,
            }
    return table


def _facts(solved: Solved) -> Mapping[str, Any]:
    """Choices of the rounds, and how many positions they had."""
    return {
        "valid_bits_per_byte": solved.losses,
        "rounds": solved.chosen,
        "trials": solved.trials,
        "positions": dict(zip(("true", "source", "all"), solved.positions, strict=True)),
    }


class Predictions:
    """Ridge regressions toward the source's predictions."""

    name: ClassVar[str] = "predictions"
    options: ClassVar[type[Section]] = PredictionOptions
    needs: ClassVar[frozenset[str]] = frozenset({"teacher"})
    chooses: ClassVar[bool] = True

    def apply(self, params: Params, source: SourceView, options: PredictionOptions, context: Context) -> Applied:
        """Solves round by round as validation text chooses; see `Operator.apply`."""
        target = context.target
        assert context.loss is not None
        batches = prediction_targets(target.spec, source.teacher(), context.batch_tokens, context.layout)
        if not batches:
            raise InputError("the operator predictions has no text to read; give more text")
        solver = Solver(
            target.spec,
            target.rows,
            target.params,
            options,
            dtype=context.dtype,
            layout=context.layout,
            known=context.known_v,
        )
        solved = solver.solve(params, batches, context.loss, context.progress, context.screen)
        rows = functools.partial(solved_rows, target, params, solved, solver.paths)
        return Applied(solved.params, _facts(solved), lambda final: rows())

    def memory(self, target: Shape, source: Shape, options: PredictionOptions, batch_tokens: int) -> int:
        """Estimates the bytes of a round: sums, changes, moved tensors."""
        return solver_memory(target, options, batch_tokens)


def solver_memory(target: Shape, options: PredictionOptions, tokens: int) -> int:
    """Estimates the memory of a round.

    Args:
        target: Architecture and tensors of the target.
        options: The operator's options.
        tokens: Tokens per batch of a forward pass.

    Returns:
        Bytes beside the parameters.
    """
    spec, by_path = target.spec, {row.path: row for row in target.param_specs}
    solver = Solver(spec, target.param_specs, {}, options)
    size = {path: math.prod(by_path[path].stacked_shape(spec)) for path in solver.paths}
    inputs = {site: by_path[path].shape(spec)[1] for path, site in solver.writers}
    grams = spec.hidden**2 + spec.layers * sum(width**2 for width in inputs.values())
    # Two right-hand sides, which the changes replace, copies of them while one is solved for, and one moved tensor.
    logits = spec.vocab * logits_at_once(spec.vocab, batch_tokens(spec.vocab, tokens))
    return 4 * (2 * grams + 5 * sum(size.values()) + 6 * logits)


OPERATOR = Predictions()
