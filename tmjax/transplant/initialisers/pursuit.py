"""Sparse combinations of kept tokens by orthogonal matching pursuit (arXiv:2506.06607; the method of tokensurgeon).

In the space of another model, which has tokens for the same texts, a new token is approximated by few kept tokens: the
one most like the residual is taken, coefficients of all taken so far are fitted by least squares, again and again. The
same coefficients on the model's own rows give the new row. A token that the other model cannot write is the mean of its
old pieces.
"""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from tmjax.errors import InputError
from tmjax.text.writing import write_within
from tmjax.transplant.initialisers.base import MakeRows, NewTokens, mean_rows
from tmjax.typing import Array

#: Kept tokens in a combination, at most.
ATOMS = 64
#: New tokens whose combinations are found together.
_BATCH = 256


class Pursuit:
    """A sparse combination of kept tokens."""

    name: ClassVar[str] = "pursuit"
    needs_source: ClassVar[bool] = True
    needs_texts: ClassVar[bool] = False

    def prepare(self, tokens: NewTokens) -> MakeRows:
        """See `Initialiser.prepare`."""
        assert tokens.source is not None
        theirs = next(table for table in tokens.source.tables.values() if table.ndim == 2)
        ids, partners = tokens.correspondence.shared()
        shared = [
            (tokens.new.vocabulary.text.get(int(number)), int(partner))
            for number, partner in zip(ids, partners, strict=True)
        ]
        shared = [(text, partner) for text, partner in shared if text]
        strings = [text for text, _ in shared] + list(tokens.correspondence.strings)
        written = [
            list(ids) if ids and max(ids) < len(theirs) else []
            for ids in write_within(tokens.source.tokenizer, strings)
        ]
        # Anchors are tokens of the other model, not means of its tokens.
        anchors = [number for number in range(len(shared)) if len(written[number]) == 1]
        known = np.array([n for n, ids in enumerate(written[len(shared) :]) if ids], int)
        if len(anchors) < 2:
            raise InputError(
                "the old vocabulary, the new one and the source's share no two tokens; give another source or --init"
            )
        atoms = mean_rows([written[number] for number in anchors], theirs)
        goals = mean_rows([written[len(shared) + number] for number in known], theirs)
        places, coefficients = matching_pursuit(goals, atoms, min(ATOMS, len(anchors), atoms.shape[1]))
        partners = np.array([shared[number][1] for number in anchors])

        def rows_of(_: str, table: np.ndarray) -> np.ndarray:
            result = mean_rows(tokens.correspondence.pieces, table)
            own = np.asarray(table[partners], np.float32)
            for number, place, weight in zip(known, places, coefficients, strict=True):
                result[number] = np.tensordot(weight, own[place], axes=1)
            return result

        return rows_of


def matching_pursuit(goals: np.ndarray, atoms: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Approximates vectors by sparse combinations of atoms.

    Args:
        goals: Vectors [m, d].
        atoms: Atoms [n, d].
        count: Atoms in each combination, at most n and d.

    Returns:
        Chosen atoms [m, count] and their coefficients [m, count] float32; an atom that adds nothing has coefficient 0.
    """
    places, coefficients = np.zeros((len(goals), count), int), np.zeros((len(goals), count), np.float32)
    for first in range(0, len(goals), _BATCH):
        part = goals[first : first + _BATCH]
        padded = np.zeros((_BATCH, goals.shape[1]), np.float32)
        padded[: len(part)] = part
        chosen, weights = _pursue(padded, np.asarray(atoms, np.float32), count)
        places[first : first + _BATCH] = np.asarray(chosen)[: len(part)]
        coefficients[first : first + _BATCH] = np.asarray(weights)[: len(part)]
    return places, coefficients


@functools.partial(jax.jit, static_argnames="count")
def _pursue(goals: Array, atoms: Array, count: int) -> tuple[Array, Array]:
    size = jnp.linalg.norm(atoms, axis=1)
    unit = atoms / jnp.maximum(size, 1e-12)[:, None]
    numbers = jnp.arange(len(goals))
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def step(at: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        basis, upper, chosen, used, residual = state
        likeness = jnp.where(used, -1.0, jnp.abs(dot("md,nd->mn", residual, unit)))
        best = jnp.argmax(likeness, axis=1)
        column = unit[best]
        # Gram-Schmidt, twice for float32: the new direction is orthogonal to those before.
        weights = dot("mkd,md->mk", basis, column)
        rest = column - dot("mkd,mk->md", basis, weights)
        again = dot("mkd,md->mk", basis, rest)
        rest = rest - dot("mkd,mk->md", basis, again)
        length = jnp.linalg.norm(rest, axis=1)
        adds = length > 1e-4
        direction = jnp.where(adds[:, None], rest / jnp.maximum(length, 1e-12)[:, None], 0.0)
        upper = upper.at[:, :, at].set(weights + again).at[numbers, at, at].set(jnp.where(adds, length, 1.0))
        residual = residual - dot("md,md->m", residual, direction)[:, None] * direction
        return (
            basis.at[:, at].set(direction),
            upper,
            chosen.at[:, at].set(best),
            used.at[numbers, best].set(True),
            residual,
        )

    m, d = goals.shape
    start = (
        jnp.zeros((m, count, d)),
        jnp.zeros((m, count, count)),
        jnp.zeros((m, count), jnp.int32),
        jnp.zeros((m, len(atoms)), bool),
        goals,
    )
    basis, upper, chosen, _, _ = jax.lax.fori_loop(0, count, step, start)
    along = dot("mkd,md->mk", basis, goals)
    solved = jax.scipy.linalg.solve_triangular(upper, along[..., None], lower=False)[..., 0]
    return chosen, solved / jnp.maximum(size[chosen], 1e-12)


INITIALISER = Pursuit()
