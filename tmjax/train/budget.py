"""A training planned from a number of tokens: batch, number of generated texts, learning rates by successive halving.

Successive halving: Jamieson and Talwalkar 2016 (arXiv:1502.07943). Every rate is trained for a short time, with a whole
schedule of its own; the best half goes on for longer, and the best of those for the rest of the tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tmjax.errors import InputError
from tmjax.recipes.adapt import AdaptRecipe

#: Largest learning rates that are tried.
RATES = (3e-4, 1e-3, 3e-3, 6e-3, 1.2e-2)
#: Part of the tokens that the search may use.
SEARCH = 0.25
#: Rates of a round, and its steps in units of the first round's.
ROUNDS = ((5, 1), (2, 3))
#: Smallest and largest number of tokens of a batch, and the number of steps that sets it between them.
BATCHES, STEPS = (256, 8192), 400
#: Tokens per generated text: those of 300 steps of 2048 tokens on 3000 texts, the best setting without a budget.
TOKENS_PER_TEXT = 200
#: Smallest and largest number of generated texts.
TEXTS = (100, 50_000)
#: Part of a time budget that is training; the rest is for generated texts, teacher probabilities and validation.
TRAINING = 0.4
#: Decay of the moving average of the weights.
AVERAGE = 0.97
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Budget:
    """The plan of every arm's training.

    Attributes:
        tokens: Tokens that an arm may be trained on, those of the search included.
        tokens_per_step: Largest number of tokens of a batch.
        texts: Number of generated texts.
        rounds: Of every round of the search: number of learning rates, and steps of each.
        steps: Steps of the last training.
    """

    tokens: int
    tokens_per_step: int
    texts: int
    rounds: tuple[tuple[int, int], ...]
    steps: int

    @classmethod
    def of(cls, tokens: int) -> "Budget":
        """Plans a training of a number of tokens.

        Args:
            tokens: Tokens that an arm may be trained on.

        Returns:
            The plan, which depends on the number alone.

        Raises:
            InputError: The number is too small for a search.
        """
        power = 2 ** max(0, (tokens // STEPS).bit_length() - 1)
        batch = min(max(power, BATCHES[0]), BATCHES[1])
        steps = tokens // batch
        first = int(steps * SEARCH) // sum(count * times for count, times in ROUNDS)
        if first < 1:
            minimum = BATCHES[0] * int(sum(count * times for count, times in ROUNDS) / SEARCH)
            raise InputError(f"a budget of {tokens} training tokens is too small; give at least {minimum}")
        rounds = tuple((count, first * times) for count, times in ROUNDS)
        last = steps - sum(count * length for count, length in rounds)
        texts = min(max(tokens // TOKENS_PER_TEXT, TEXTS[0]), TEXTS[1])
        return cls(tokens, batch, texts, rounds, last)

    def applied(self, recipe: AdaptRecipe) -> AdaptRecipe:
        """Returns a recipe with the settings of the plan."""
        lengths = tuple(dict.fromkeys([*(length for _, length in self.rounds), self.steps]))
        settings = {"steps": lengths, "lr": RATES, "tokens_per_step": self.tokens_per_step, "accumulate": 1}
        training = recipe.training.model_copy(update=settings | {"average": AVERAGE})
        generation = recipe.generation.model_copy(update={"texts": self.texts})
        return recipe.model_copy(update={"training": training, "generation": generation})

    def search(self, train: Callable[[int, float], float]) -> None:
        """Trains by successive halving.

        Args:
            train: Trains for a number of steps at a largest learning rate and returns the validation loss.
        """
        rates = list(RATES)
        for count, steps in self.rounds:
            losses = {rate: train(steps, rate) for rate in rates[:count]}
            rates = sorted(losses, key=losses.__getitem__)
        train(self.steps, rates[0])


def seconds_of(text: str) -> float:
    """Returns the seconds of a duration such as `90s`, `30m` or `1.5h`, the form that recipes are checked for."""
    return float(text[:-1]) * _UNITS[text[-1]]


def tokens_of(seconds: float, tokens_per_second: float) -> int:
    """Returns the training tokens that a time budget pays for at a measured throughput."""
    return int(seconds * TRAINING * tokens_per_second)
