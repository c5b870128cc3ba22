"""The context of the operators of a merge: their inputs beside the source."""

import functools
from collections.abc import Iterable
from typing import Any

from tmjax.checkpoints.load import load_model
from tmjax.commands.merge.session import Session
from tmjax.models.spec import DecoderSpec
from tmjax.train.data import Batches
from tmjax.train.step import next_token_loss
from tmjax.transfer.contribution import BatchLoss, Context


def merge_context(session: Session, stage: str) -> Context:
    """Returns the context of one arm, whose progress is shown under the name of a stage."""
    inputs, recipe = session.inputs, session.recipe
    return Context(
        target=inputs.target,
        **inputs.validation,
        alpha=recipe.alpha,
        coefficients=recipe.coefficients,
        training=_training(session),
        known_v=inputs.target_tokenizer.known(inputs.target.spec.vocab),
        batch_tokens=recipe.evaluation.batch_tokens,
        dtype=inputs.dtype,
        layout=inputs.layout,
        seed=recipe.seed,
        progress=session.step(stage),
        load_model=lambda name: load_model(recipe.place(name), placement=inputs.layout.place),
    )


def _training(session: Session) -> tuple[Iterable[Any], BatchLoss] | None:
    """Returns calibration batches, the same for all arms, and the target's loss, for learned coefficients."""
    recipe, inputs = session.recipe, session.inputs
    options = recipe.coefficients
    if options.fit != "learned" or recipe.alpha is not None:
        return None
    tokenizer, spec = inputs.target_tokenizer, inputs.target.spec
    documents = [tokenizer.document(encoding.ids) for encoding in tokenizer.encode(inputs.texts.texts)]
    longest = min(spec.max_positions, recipe.activations.max_tokens)
    data = Batches(documents, tokens=options.learning.batch_tokens, seed=recipe.seed, lengths=2, max_tokens=longest)
    return data, _token_loss(spec)


@functools.cache
def _token_loss(spec: DecoderSpec) -> BatchLoss:
    """Returns the same function object for every arm, so that nothing is compiled again."""
    return functools.partial(next_token_loss, spec)
