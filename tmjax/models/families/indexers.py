"""Settings of latent attention to the tokens that an indexer picks (DeepSeek sparse attention)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tmjax.errors import InputError
from tmjax.models.blocks.low_rank import Indexer
from tmjax.models.families import latent, mixtures
from tmjax.models.families.config_values import ConfigView
from tmjax.models.spec import DecoderSpec

#: Names of such layers in `layer_types`, which only say how transformers caches them.
_KINDS = {"indexed_attention", "deepseek_sparse_attention"}


def read(
    view: ConfigView, values: Mapping[str, Any], defaults: Mapping[str, Any], layers: tuple[int, ...]
) -> dict[str, Any]:
    """Reads a mixture of experts whose attention has indexers.

    Args:
        view: The config.
        values: Fields of the spec that were read.
        defaults: Values of keys that are missing.
        layers: Layers with an indexer of their own.

    Returns:
        Fields of the spec; its context is what an indexer picks, since all tokens are attended to there.

    Raises:
        InputError: A setting is not supported; names it.
    """
    kinds = view.take("layer_types", [], list)
    if not all(kind in _KINDS for kind in kinds):
        raise InputError(f"config.json: layer_types has other layers than {', '.join(sorted(_KINDS))}")
    view.take("head_dim", 0)  # transformers takes the rotary part's size in its place
    if view.null("q_lora_rank"):
        raise InputError("config.json: q_lora_rank null is not supported where an indexer reads the queries' rank")
    chosen = view.take("index_topk", defaults["index_topk"])
    indexer = Indexer(
        chosen,
        view.take("index_n_heads", defaults["index_n_heads"]),
        view.take("index_head_dim", defaults["index_head_dim"]),
        layers,
    )
    result = latent.read_attention(view, values, defaults)
    dense = latent.read_kinds(view, values["layers"], mixtures.leading(view, values["layers"], 3))
    counts = dict(defaults) | {"n_routed_experts": view.take("num_experts", defaults["n_routed_experts"])}
    return result | {
        "latent": replace(result["latent"], indexer=indexer),
        "max_positions": min(values["max_positions"], chosen),
        "experts": mixtures.read_experts(view, counts, dense),
    }


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Writes the settings that `read` reads, but for the layers with an indexer."""
    assert spec.latent is not None and spec.latent.indexer is not None
    indexer = spec.latent.indexer
    sizes = {"index_topk": indexer.chosen, "index_n_heads": indexer.heads, "index_head_dim": indexer.dim}
    return latent.write_attention(spec) | mixtures.write_experts(spec) | latent.write_kinds(spec) | sizes
