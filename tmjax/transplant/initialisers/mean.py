"""The mean of the rows of a token's old pieces (Gee et al. 2022, *Fast Vocabulary Transfer*)."""

from typing import ClassVar

from tmjax.transplant.initialisers.base import MakeRows, NewTokens, mean_rows


class Mean:
    """The mean over old pieces."""

    name: ClassVar[str] = "mean"
    needs_source: ClassVar[bool] = False
    needs_texts: ClassVar[bool] = False

    def prepare(self, tokens: NewTokens) -> MakeRows:
        """See `Initialiser.prepare`."""
        return lambda _, table: mean_rows(tokens.correspondence.pieces, table)


INITIALISER = Mean()
