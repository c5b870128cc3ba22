"""Configuration of a training, schedules and the optimiser.

AdamW with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101), on matrices only.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import optax

from tmjax.errors import InputError
from tmjax.recipes.adapt import TrainingOptions
from tmjax.typing import ArrayLike, Params

#: Prefix of the paths of the maps from target to source features; they are trained, but no part of the model.
GUIDE = "guide."


@dataclass(frozen=True)
class TrainConfig:
    """Steps and optimiser; hashable, so it is a static argument of the jitted step.

    Parameters and optimiser are float32.

    Attributes:
        steps: Number of updates.
        tokens_per_step: Tokens of a batch.
        lr: Largest learning rate.
        warmup: Steps over which the learning rate rises linearly to `lr`; it then falls along a cosine.
        final_lr: Learning rate of the last step, relative to `lr`.
        weight_decay: Decay of matrices (not of norms and biases).
        clip: Largest global norm of the gradient.
        b1: Decay of Adam's first moment.
        b2: Decay of Adam's second moment.
        eps: Adam's epsilon.
        accumulate: Batches of a step.
        dtype: The dtype of the forward and backward pass.
        remat: Whether only the residual stream between blocks is stored for the backward pass.
        unroll: Layers per turn of the loop over them; more take longer to compile and run faster.
        guide_weight: Weight of guidance in the loss, where batches have a guide.
        teacher_weight: Weight of the divergence from a teacher, where batches have one.
        anneal: Both weights fall along a cosine to this part of themselves at the last step.
        average: Decay per step of the moving average of the trained arrays; 0 keeps none.
    """

    steps: int
    tokens_per_step: int = 4096
    lr: float = 3e-3
    warmup: int = 100
    final_lr: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    accumulate: int = 1
    dtype: str = "float32"
    remat: bool = False
    unroll: int = 1
    guide_weight: float = 0.0
    teacher_weight: float = 0.0
    anneal: float = 1.0
    average: float = 0.0

    def __post_init__(self) -> None:
        bad = [
            n for n in ("steps", "tokens_per_step", "lr", "clip", "accumulate", "unroll") if not getattr(self, n) > 0
        ]
        if bad:
            raise InputError(f"training needs positive {', '.join(bad)}")
        if not 0 <= self.warmup < self.steps:
            raise InputError(f"a warm-up of {self.warmup} steps does not fit into {self.steps} steps")

    @classmethod
    def of(
        cls,
        options: TrainingOptions,
        steps: int,
        lr: float,
        dtype: str,
        *,
        guide_weight: float = 0.0,
        teacher_weight: float = 0.0,
    ) -> Self:
        """Returns the configuration of one of a recipe's schedules.

        Args:
            options: The recipe's section.
            steps: Number of updates.
            lr: Largest learning rate.
            dtype: The dtype of the forward and backward pass.
            guide_weight: Weight of guidance.
            teacher_weight: Weight of the divergence from a teacher.
        """
        names = ("tokens_per_step", "accumulate", "warmup", "final_lr", "weight_decay", "clip", "b1", "b2")
        shared = {name: getattr(options, name) for name in (*names, "eps", "remat", "unroll", "anneal", "average")}
        return cls(steps, lr=lr, dtype=dtype, guide_weight=guide_weight, teacher_weight=teacher_weight, **shared)


class Weights(NamedTuple):
    """Weights of guidance and teacher in the loss."""

    guide: ArrayLike = 0.0
    teacher: ArrayLike = 0.0

    @classmethod
    def at(cls, config: TrainConfig, count: int) -> "Weights":
        """Returns the weights of the step that follows `count` steps."""
        fallen = 0.5 - 0.5 * np.cos(np.pi * count / max(1, config.steps - 1))
        scale = 1.0 - (1.0 - config.anneal) * fallen
        return cls(np.float32(config.guide_weight * scale), np.float32(config.teacher_weight * scale))


def decayed(params: Params) -> dict[str, bool]:
    """Returns whether weight decay acts on each parameter: on matrices within a layer, not on maps of the guidance."""
    return {
        path: not path.startswith(GUIDE) and value.ndim - ("blocks." in path) >= 2 for path, value in params.items()
    }


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Returns the schedule of learning rates: that of the step that follows `count` steps."""
    return optax.warmup_cosine_decay_schedule(
        init_value=config.lr / (config.warmup + 1),
        peak_value=config.lr,
        warmup_steps=config.warmup,
        decay_steps=config.steps,
        end_value=config.lr * config.final_lr,
    )


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Chains global-norm clipping and AdamW at a learning rate of 1: updates are still to be multiplied by -rate."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )
