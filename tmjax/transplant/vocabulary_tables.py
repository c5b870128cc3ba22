"""A model with the tables of a new vocabulary: kept rows bit for bit, new ones by an initialiser."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tmjax.checkpoints.model import Model
from tmjax.models.spec import ParamSpec
from tmjax.text.tokenizer import TextTokenizer
from tmjax.transplant.initialisers.base import Initialiser, MakeRows, NewTokens, SourceTables

_AXIS = "vocab"
#: Keys of a config that name a token, or several.
_TOKEN_KEYS = ("_token_id", "_token_ids")


def vocabulary_rows(model: Model) -> tuple[ParamSpec, ...]:
    """The rows of a family's table that have an entry per token and are stored."""
    return tuple(row for row in model.rows if _AXIS in row.axes and row.tied_to is None)


def source_tables(model: Model, tokenizer: TextTokenizer) -> SourceTables:
    """Reads the tables of another model; those of a tied head are its embeddings."""
    tables = {row.path: np.asarray(model.params[row.path][()]) for row in vocabulary_rows(model)}
    tied = {row.path: tables[row.tied_to] for row in model.rows if _AXIS in row.axes and row.tied_to is not None}
    return SourceTables(tokenizer, tables | tied)


def transplant(model: Model, tokens: NewTokens, initialiser: Initialiser) -> Model:
    """Gives a model the tables of a new vocabulary.

    Args:
        model: The model, its parameters in memory or on disk.
        tokens: Both vocabularies.
        initialiser: Makes the rows of new tokens.

    Returns:
        The model with new tables, and with the ids of special tokens in its config changed to the new ones. Special
        tokens without a counterpart, holes and padding receive an old padding row, or the mean of all rows.
    """
    count = len(tokens.correspondence.kept)
    make = initialiser.prepare(tokens)
    tables = {
        row.path: _table(row.path, np.asarray(model.params[row.path][()]), tokens, make)
        for row in vocabulary_rows(model)
    }
    config = renumbered(model.config, tokens) | {"vocab_size": count}
    return replace(model, spec=replace(model.spec, vocab=count), params={**model.params, **tables}, config=config)


def _table(path: str, old: np.ndarray, tokens: NewTokens, make: MakeRows) -> np.ndarray:
    """The table [rows, ...] of one parameter in its own dtype."""
    of_new = tokens.correspondence
    new = np.empty((len(of_new.kept), *old.shape[1:]), old.dtype)
    ids, partners = of_new.shared()
    new[ids] = old[partners]
    if len(of_new.new):
        new[of_new.new] = make(path, old).astype(old.dtype)
    known = tokens.old.known(len(old))
    padding = None if known is None or known.all() else old[np.flatnonzero(~known)[0]]
    mean = np.asarray(old, np.float32).mean(axis=0).astype(old.dtype)
    for number in of_new.rest:
        special = int(number) in tokens.new.vocabulary.special
        new[number] = mean if special or padding is None else padding
    return new


def renumbered(config: Mapping[str, Any], tokens: NewTokens) -> dict[str, Any]:
    """Changes the ids of special tokens in a config to those of the new vocabulary.

    Args:
        config: A model's `config.json` or `generation_config.json`.
        tokens: Both vocabularies.

    Returns:
        The config; a token without a counterpart is replaced by the new tokenizer's own, or its key is left out.
    """
    ids, partners = tokens.correspondence.shared()
    new_of = {int(partner): int(number) for number, partner in zip(ids, partners, strict=True)}
    result: dict[str, Any] = {}
    for key, value in config.items():
        if not key.endswith(_TOKEN_KEYS) or value is None:
            result[key] = value
            continue
        listed = value if isinstance(value, list) else [value]
        named = getattr(tokens.new.fast, key.removesuffix("_token_id") + "_token_id", None)
        ids_now = [new_of[number] for number in listed if number in new_of]
        # The new tokenizer knows its own special tokens; the others of a list are kept where they have a counterpart.
        if named is not None:
            ids_now = [named, *(number for number in ids_now if number != named)]
        if ids_now:
            result[key] = ids_now if isinstance(value, list) else ids_now[0]
    return result
