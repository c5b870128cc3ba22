"""The best parameters on validation text so far, kept where the trained ones are."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from tmjax.typing import Array


@jax.jit
def _copied(arrays: dict[str, Array]) -> dict[str, Array]:
    """Copies of arrays, laid out as they are: a training step donates, and so destroys, the arrays that it is given."""
    return jax.tree.map(jnp.copy, arrays)


@dataclass
class Selection:
    """The best validation loss so far, a copy of the trained arrays that gave it and the steps before them.

    The copy is laid out over the devices as the trained arrays are.
    """

    loss: float = float("inf")
    step: int = 0
    worse: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    trained: dict[str, Array] | None = None

    def see(self, count: int, loss: float, trained: dict[str, Array]) -> None:
        """Records the validation loss after `count` steps, and the trained arrays if it is the best."""
        self.history.append((count, loss))
        if loss < self.loss:
            self.loss, self.step, self.worse = loss, count, 0
            self.trained = None  # or there would be memory for two copies
            self.trained = _copied(trained)
        else:
            self.worse += 1
