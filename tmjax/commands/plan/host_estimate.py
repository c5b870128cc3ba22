"""Memory of the host and disk that a run needs, estimated from sizes alone."""

from collections.abc import Mapping

from tmjax.align.sizes import row_budget, sites_of
from tmjax.commands.doctor.estimate import Reading, memory
from tmjax.commands.doctor.side import Side
from tmjax.commands.plan.planned import Workload
from tmjax.recipes.adapt import AdaptRecipe
from tmjax.recipes.merge import Recipe
from tmjax.transfer.chain import aligns, chain_of, chain_projections


def host_estimate(
    recipe: Recipe | AdaptRecipe, sides: Mapping[str, Side], work: Workload, shards: int
) -> dict[str, float]:
    """Estimates bytes in host memory of the largest stage, and on disk.

    Args:
        recipe: The recipe.
        sides: `target`, and `source` where there is one.
        work: Amount of text.
        shards: Devices that a parameter is split over.

    Returns:
        `memory`, and `disk`: activations or checkpoints of the training, and the result.
    """
    target = sides["target"]
    if isinstance(recipe, AdaptRecipe):
        # Checkpoints of the training hold parameters and two moments in float32.
        stored = 12 * recipe.training.keep * target.parameters
        if "guidance" in recipe.terms:
            rows = work.texts * work.words
            stored += 4 * rows * sum(side.spec.layers * side.spec.hidden for side in sides.values())
        return {"memory": float(max(side.bytes for side in sides.values())), "disk": float(stored + target.bytes)}
    source, chain = sides["source"], chain_of(recipe)
    sites = sites_of(target, source, chain_projections(chain, target.rows, source.rows), recipe.alignment.structure)
    rows = work.texts * (1 if recipe.activations.pooling == "sequence" else work.words)
    layers = target.spec.layers, source.spec.layers
    rows = min(rows, row_budget(sites, layers, recipe.activations) or rows)
    tokens = work.texts * work.tokens
    estimate = memory(target, source, sites, Reading(rows, tokens, tokens, work.assumed), recipe, shards)
    stored = 0
    if aligns(chain) and recipe.activations.keep:
        stored = 4 * rows * sum(layers[0] * n + layers[1] * k for n, k in sites.units.values())
    return {"memory": float(estimate["peak"]), "disk": float(stored + target.bytes)}
