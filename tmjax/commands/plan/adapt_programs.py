"""Programs of an adaptation, in the order in which they run."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from tmjax.activations.capture import CaptureOptions
from tmjax.commands.doctor.side import Side
from tmjax.commands.plan.planned import Entry, Placement, Planned, Workload
from tmjax.commands.plan.source_programs import SourcePrograms
from tmjax.errors import InputError
from tmjax.models.spec import projections
from tmjax.recipes.adapt import AdaptRecipe
from tmjax.teacher.edges import EXAMPLES
from tmjax.teacher.generation import Generation
from tmjax.teacher.probabilities import Search
from tmjax.teacher.span_features import SITE
from tmjax.train.budget import Budget
from tmjax.train.data import ROW_STEP, Batch, Guide
from tmjax.train.loss import TeacherTokens
from tmjax.train.modes import Lora, Mode, Plain, map_sharding, shardings_of
from tmjax.train.optimizer import GUIDE, TrainConfig, Weights, optimizer
from tmjax.train.step import Objective, State, train_step


def adapt_entries(recipe: AdaptRecipe, sides: dict[str, Side], place: Placement, work: Workload) -> Iterator[Entry]:
    """Lists the programs of an adaptation; a merge that it begins with is a plan of its own.

    Args:
        recipe: The recipe.
        sides: `target`, and `source` where there is one.
        place: Devices.
        work: Amount of text.

    Yields:
        Stage, name and maker of every program.

    Raises:
        InputError: The mode trains a merge's residual, whose arrays are known only after the merge; or the budget is a
            time.
    """
    if recipe.budget is not None:
        raise InputError("a budget of time is converted on the machine itself; plan with tokens instead of budget")
    if recipe.tokens is not None:
        recipe = Budget.of(recipe.tokens).applied(recipe)
    if recipe.mode == "residual-frozen":
        raise InputError("plan reads no residuals: plan the merge, and the mode sft or combined for the training")
    live = {name: place.params(side) for name, side in sides.items()}
    programs = SourcePrograms(place, jnp.dtype(recipe.dtype), live)
    target, terms = sides["target"], recipe.terms
    tokens, texts = min(work.tokens, recipe.max_tokens), min(work.texts, recipe.max_texts or work.texts)
    if "generated" in terms:
        examples = recipe.generation.examples
        generation = Generation.of(recipe.generation, EXAMPLES if examples is None else examples)
        yield from programs.generation("source", sides["source"], generation, tokens)
    if "distillation" in terms:
        yield from programs.probabilities("source", sides["source"], texts, tokens, Search.of(recipe.distillation))
    if "guidance" in terms:
        options = CaptureOptions((SITE,), dtype=programs.dtype, layout=place.layout)
        for name in ("target", "source"):
            yield (
                f"features:{name}",
                "capture",
                lambda name=name: programs.capture(name, sides[name], texts, tokens, min(work.words, tokens), options),
            )
    yield "training", "step", lambda: _training(recipe, sides, programs, tokens)
    trained = place.params(target, "float32")
    yield (
        "training",
        "validation",
        lambda: programs.scoring(
            trained,
            target,
            (work.valid, work.tokens),
            recipe.evaluation.batch_tokens,
            # Optimiser and the best parameters so far.
            {"models": programs.live, "optimizer": (trained, trained), "best": trained},
        ),
    )


def _training(recipe: AdaptRecipe, sides: dict[str, Side], programs: SourcePrograms, tokens: int) -> Planned:
    """A training step with the terms of the recipe."""
    place, target, training = programs.place, sides["target"], recipe.training
    spec, layout = target.spec, place.layout
    wide = place.params(target, "float32")
    places = shardings_of(layout, target.rows, spec, recipe.lora.rank if recipe.mode == "lora" else 0)

    def whole(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return place.array(shape, dtype)

    mode: Mode = Plain()
    trained, frozen = wide, {}
    if recipe.mode == "lora":
        rows, rank = projections(target.rows), recipe.lora.rank
        mode = Lora(tuple(r.path for role, r in rows.items() if role in (recipe.lora.roles or rows)), rank)
        trained, frozen = {}, wide
        for path in mode.paths:
            layers, out, into = wide[path].shape
            for name, shape in (("lora_a", (layers, rank, into)), ("lora_b", (layers, out, rank))):
                key = f"{name}.{path}"
                where = places.get(key)
                x = whole(shape)
                trained[key] = x if where is None else jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
    length = -(-tokens // ROW_STEP) * ROW_STEP
    rows = max(1, training.tokens_per_step // length)
    rows = -(-rows // layout.batch_multiple) * layout.batch_multiple
    guide = teacher = None
    if "guidance" in recipe.terms:
        units, layers = sides["source"].spec.hidden, spec.layers
        shape = (layers, units, spec.hidden)
        where = map_sharding(layout, shape)
        weight = whole(shape) if where is None else jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
        trained = trained | {f"{GUIDE}weight": weight, f"{GUIDE}bias": whole((layers, units))}
        frozen = frozen | {f"{GUIDE}{name}": whole((layers, spec.hidden)) for name in ("mean", "scale")}
        spans = max(1, round(0.75 * tokens))
        positions, mask = (place.batch((rows, spans), kind) for kind in (jnp.int32, jnp.float32))
        guide = Guide(positions, mask, place.batch((layers, rows, spans, units), jnp.float32, axis=1))
    if "distillation" in recipe.terms:
        keep = recipe.distillation.keep
        ids, weights = (place.batch((rows, length, keep), kind) for kind in (jnp.int32, jnp.float32))
        teacher = TeacherTokens(ids, weights, place.batch((rows, length), jnp.float32))
    numbers = place.batch((rows, length), jnp.int32)
    batch = Batch(numbers, numbers, place.batch((rows, length), jnp.float32), guide, teacher)
    steps, lr = training.schedules[0]
    config = TrainConfig.of(training, steps, lr, recipe.dtype)
    objective = Objective(spec, config, mode, layout.mesh).compiled()

    def beside(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        """Moments lie like their parameters, as `start` makes them."""
        name = getattr(path[-1], "key", None)
        if name in trained:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=trained[name].sharding)
        return whole(x.shape, x.dtype)

    moments = jax.eval_shape(optimizer(objective.config).init, trained)
    average = trained if training.average else {}
    state = State(trained, jax.tree_util.tree_map_with_path(beside, moments), whole((), jnp.bool_), average)
    arguments = objective, state, frozen, batch, whole(()), Weights(whole(()), whole(()))
    calls = sum(steps for steps, _ in training.schedules) * training.accumulate
    live = {"models": programs.live, "best": trained}
    return Planned(train_step, arguments, calls, live, settings={"training.tokens_per_step": rows * length})
