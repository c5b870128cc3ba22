"""Settings of the objectives and modes of an adaptation."""

from typing import Annotated, Literal

from pydantic import Field

from tmjax.recipes.base import (
    FOREIGN,
    Positive,
    PositiveFloat,
    Role,
    Section,
)


class GuidanceOptions(Section):
    """Maps from target features to source features, which training keeps good."""

    weight: Annotated[PositiveFloat, Field(description="Weight of the term in the loss.")] = 5.0
    penalty: Annotated[
        PositiveFloat,
        Field(description="Ridge penalty of the initial maps, in units of a standardised unit's variance."),
    ] = 0.1
    layers: Annotated[
        Literal["depth", "plan"],
        Field(
            description="A target layer is tied to the source layer at its relative `depth`, or to the one with most "
            "weight in the layer `plan` of the run that is adapted."
        ),
    ] = "depth"
    metric: Annotated[
        Literal["units", "fisher"],
        Field(
            description="Errors count alike in every standardised unit (`units`), or by their effect on the source's "
            "predictions (`fisher`: the Fisher information of its read-out)."
        ),
    ] = "units"


class DistillationOptions(Section):
    """Training toward the source's probabilities of the target's tokens."""

    weight: Annotated[PositiveFloat, Field(description="Weight of the divergence in the loss.")] = 4.0
    steps: Annotated[
        Positive, Field(description="Largest number of source tokens in a chain that spells a target token.")
    ] = 3
    candidates: Annotated[
        Positive, Field(description="Likeliest tokens of each distribution of the source that are read.")
    ] = 128
    min_probability: Annotated[
        PositiveFloat, Field(description="Smallest probability of an unfinished chain that is followed.")
    ] = 0.02
    branches: Annotated[
        Positive, Field(description="Largest number of chains that are followed per position and step.")
    ] = 4
    keep: Annotated[Positive, Field(description="Likeliest target tokens that are kept per position.")] = 32


class GenerationOptions(Section):
    """Texts that the source generates after the first words of training texts."""

    texts: Annotated[Positive, Field(description="Number of generated texts.")] = 3000
    words: Annotated[Positive, Field(description="Prompts are the first 1 to so many words of training texts.")] = 3
    tokens: Annotated[Positive, Field(description="Largest number of new tokens of a text.")] = 96
    temperature: Annotated[PositiveFloat, Field(description="Temperature of sampling.")] = 0.8
    top_p: Annotated[
        float | None,
        Field(gt=0, le=1, description="Probability mass of nucleus sampling; from the whole vocabulary unless given."),
    ] = None
    examples: Annotated[
        int | None,
        Field(
            ge=0,
            description="Given texts that stand before every prompt, a line each, which keep a general model with "
            "their subject and form; a generated text then ends with its line. null: 3 for a source that begins or "
            "ends the given texts by another convention, else none. Such a source reads them before other texts too.",
        ),
    ] = None
    foreign: Annotated[
        PositiveFloat | None,
        Field(
            description="Generated texts whose bits per byte under the target exceed so many times the 95th percentile "
            "of the given texts are left out; null keeps all."
        ),
    ] = FOREIGN
    repeat: Annotated[Positive, Field(description="Times that each given text is read per generated text.")] = 1


class ResidualOptions(Section):
    """Training of W_base + alpha Mask Delta, with the transported Delta of a merge."""

    variant: Annotated[
        Literal["frozen_delta", "frozen_base"],
        Field(description="`frozen_delta` trains the base, `frozen_base` trains the delta."),
    ] = "frozen_delta"


class LoraOptions(Section):
    """Low-rank updates of projections."""

    rank: Annotated[Positive, Field(description="Rank of the updates.")] = 8
    alpha: Annotated[PositiveFloat, Field(description="Updates are multiplied by alpha over rank.")] = 16.0
    roles: Annotated[
        tuple[Role, ...] | None, Field(min_length=1, description="Projections that are updated; all unless given.")
    ] = None
