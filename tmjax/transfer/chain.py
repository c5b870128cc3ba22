"""Running an operator list: contributions get their coefficients jointly, every other operator is applied by itself."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tmjax.checkpoints.model import Model
from tmjax.errors import InputError
from tmjax.models.spec import ParamSpec, shared_projections
from tmjax.recipes.merge import Recipe
from tmjax.transfer.coefficients.grid_search import Fit, fit, fixed
from tmjax.transfer.coefficients.learned import FuseLearned, expanded, learn, start
from tmjax.transfer.contribution import Coefficients, Context, Contribution
from tmjax.transfer.operator import Chain, Step, operators_of
from tmjax.transfer.source_view import SourceView
from tmjax.transfer.update_table import Table, changes, joined_table
from tmjax.typing import ArrayLike, Params


@dataclass(frozen=True)
class Merged:
    """The result of an operator list.

    Attributes:
        model: The merged model, in the target's dtypes.
        fit: Coefficients of everything that was transported; None where nothing was.
        facts: Manifest entries by operator.
        table: The update table: Hugging Face name of a tensor -> column -> value.
    """

    model: Model
    fit: Fit | None
    facts: Mapping[str, Any]
    table: Table


def chain_of(recipe: Recipe) -> Chain:
    """Reads the operators of a recipe that run: at a fixed alpha those that choose on validation texts are left out."""
    chain = operators_of(recipe)
    return chain if recipe.alpha is None else tuple(step for step in chain if not step.operator.chooses)


def needs_of(chain: Chain) -> frozenset[str]:
    """Returns what the operators of a chain ask of the source."""
    return frozenset().union(*(step.operator.needs for step in chain))


def aligns(chain: Chain) -> bool:
    """Whether an operator reads an alignment or the activations that one is made from."""
    return bool(needs_of(chain) & {"alignment", "activations"})


def named_roles(chain: Chain) -> tuple[str, ...] | None:
    """Returns the roles that options of operators with an alignment name (`roles`); None if all are meant."""
    asked = [getattr(step.options, "roles", None) for step in chain if "alignment" in step.operator.needs]
    return None if not asked or None in asked else tuple(dict.fromkeys(role for roles in asked for role in roles))


def chain_projections(
    chain: Chain, target_specs: tuple[ParamSpec, ...], source_specs: tuple[ParamSpec, ...]
) -> dict[str, ParamSpec]:
    """Returns the target's rows of the projections whose sites are aligned, by role.

    Those are the roles that the operators' options name (`roles`), or all that both models have.

    Raises:
        InputError: An operator needs an alignment and the models share no projection, as a mixture of experts with
            latent attention and any other model.
    """
    shared = shared_projections(target_specs, source_specs, named_roles(chain))
    if aligns(chain) and not shared:
        raise InputError(
            "the two models share no projection that could be transported; leave transport out, as in operators:"
            " [{embeddings: {}}, {predictions: {}}]"
        )
    return shared


def apply_chain(chain: Chain, source: SourceView, context: Context) -> Merged:
    """Applies operators in order.

    Args:
        chain: The operators and their options.
        source: The view of the source in this arm.
        context: Target, validation loss, devices, seed.

    Returns:
        The merged model, coefficients, manifest entries and update table.

    Raises:
        InputError: Coefficients or steps are to be chosen and there is no validation loss, two neighbours contribute
            to the same role, or an operator lacks what it needs.
    """
    target = context.target
    params: Params = target.params
    fits: list[Fit] = []
    facts: dict[str, Any] = {}
    rows: list[Callable[[Params], Table]] = []
    for together in _grouped(chain):
        if together[0].contributes:
            params, chosen, of_group = _contributed(together, params, source, context)
            fits.append(chosen)
            rows.append(of_group)
            continue
        (step,) = together
        operator = step.operator
        if operator.chooses and context.loss is None:
            raise InputError(f"the operator {operator.name} chooses on validation texts: give some, or fix alpha")
        applied = operator.apply(params, source.for_needs(operator.needs), step.options, context)
        measured = {} if applied.rows else _measured(context, params, applied.params, operator.name)
        rows.append(applied.rows or (lambda final, table=measured: table))
        params = applied.params
        facts[_free(operator.name, facts)] = dict(applied.facts)
    table = joined_table(part(params) for part in rows)
    return Merged(target.with_params(params), _joined(fits), facts, table)


def _grouped(chain: Chain) -> Iterator[tuple[Step, ...]]:
    """Neighbours that contribute together, every other operator alone."""
    for contributes, steps in itertools.groupby(chain, key=lambda step: step.contributes):
        if contributes:
            yield tuple(steps)
        else:
            yield from ((step,) for step in steps)


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """The name, with a number if an operator of that name came before."""
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if each not in taken)


def _measured(context: Context, before: Params, after: Params, name: str) -> Table:
    """Rows of all tensors that an operator changed, with the size of its change in a column of its name."""
    target = context.target
    measured = changes(target.spec, target.rows, target.params, before, after)
    return {tensor: {"effective_update": whole, name: step} for tensor, (step, whole) in measured.items()}


def _contributed(
    together: tuple[Step, ...], params: Params, source: SourceView, context: Context
) -> tuple[dict[str, ArrayLike], Fit, Callable[[Params], Table]]:
    """Parameters with the contributions of neighbours, their coefficients, and rows of the update table."""
    target, options = context.target, context.coefficients
    contributions = [
        step.operator.contribute(params, source.for_needs(step.operator.needs), step.options, context)
        for step in together
    ]
    roles = tuple(role for each in contributions for role in each.items)
    twice = sorted({role for role in roles if roles.count(role) > 1})
    if twice:
        names = " and ".join(step.operator.name for step in together)
        raise InputError(f"operators {names} both contribute to {', '.join(twice)}; set roles, or part them")
    if source.contribution != 1:
        contributions = [
            replace(each, items=each.rule.scaled(each.items, source.contribution)) for each in contributions
        ]

    def combine(coefficients: Coefficients) -> dict[str, ArrayLike]:
        fused = dict(params)
        for each in contributions:
            fused = each.rule(fused, each.items, coefficients)
        return fused

    if context.alpha is not None:
        chosen = fixed(context.alpha, options, roles)
    elif context.loss is None:
        raise InputError("a merge needs alpha or a validation loss to choose it by")
    elif options.fit == "learned":
        chosen = _learned(contributions, params, roles, context)
    else:
        loss, screen = context.loss, context.screen
        short = None if screen is None else (lambda coefficients: screen(combine(coefficients)))
        chosen = fit(options, lambda coefficients: loss(combine(coefficients)), context.progress, roles, short)

    def rows(final: Params) -> Table:
        parts = [each.rule.rows(target.params, final, each.items, chosen.coefficients) for each in contributions]
        return functools.reduce(lambda table, part: {**table, **part}, parts, {})

    return combine(chosen.coefficients), chosen, rows


def _learned(contributions: list[Contribution], params: Params, roles: tuple[str, ...], context: Context) -> Fit:
    target, options = context.target, context.coefficients
    if context.training is None:
        raise InputError("coefficients.fit: learned needs calibration batches: pass training")
    assert context.loss is not None
    begin = start(target.spec, target.projections, roles, options.learning.granularity)
    combine = FuseLearned(target.spec, target.rows, tuple(each.rule for each in contributions))
    arrays = dict(params), tuple(each.items for each in contributions)
    chosen = learn(combine, arrays, begin, *context.training, context.loss, options.learning, context.progress)
    return replace(chosen, coefficients=expanded(target.spec, target.projections, chosen.coefficients))


def _joined(fits: list[Fit]) -> Fit | None:
    """One record of all coefficients that were chosen, in order."""
    if not fits:
        return None
    coefficients = functools.reduce(lambda all_, one: {**all_, **one.coefficients}, fits, {})
    return Fit(coefficients, fits[-1].loss, [trial for one in fits for trial in one.trials])


def _mean(value: ArrayLike | float) -> float:
    return float(np.mean(np.asarray(value, np.float64)))


def fit_facts(chosen: Fit) -> dict[str, Any]:
    """Returns coefficients by role (means, if learned: by layer they are in the update table), and all trials."""
    return {
        "by_role": {
            role: {"alpha": _mean(alpha), "beta": _mean(beta)} for role, (alpha, beta) in chosen.coefficients.items()
        },
        "valid_bits_per_byte": chosen.loss,
        "trials": [
            {"loss": trial.loss, "coefficients": {role: list(pair) for role, pair in trial.coefficients.items()}}
            for trial in chosen.trials
        ],
    }
