"""How many floating-point operations the forward pass of an extraction takes, from sizes alone."""

from collections.abc import Sequence

from tmjax.models.families.base import Family
from tmjax.models.sites import SITES
from tmjax.models.spec import DecoderSpec, projections


def matrix_parameters(family: Family, spec: DecoderSpec) -> int:
    """Entries of all projections: the parameters without embeddings, head and norms."""
    found = 0
    for row in projections(family.params(spec)).values():
        layers, out, into = row.stacked_shape(spec)
        found += layers * out * into
    return found


def forward_flops(family: Family, spec: DecoderSpec, lengths: Sequence[int]) -> int:
    """2 x parameters x tokens, and attention: two products of [T, head_dim] with [head_dim, T] per head and layer.

    `lengths` are the tokens T of every text. The whole square of scores counts, as it is computed and as model FLOPs
    utilisation counts it by custom (Chowdhery et al. 2022, appendix B). The head is not run in an extraction and
    embedding is a look-up: neither counts.
    """
    attention = 4 * spec.layers * spec.heads * spec.head_dim * sum(length * length for length in lengths)
    return 2 * matrix_parameters(family, spec) * sum(lengths) + attention


def pooling_flops(spec: DecoderSpec, sites: Sequence[str], lengths: Sequence[int], rows: Sequence[int]) -> int:
    """Averages over tokens, a product [R, T] x [T, unit] per layer and site of each text; no part of the model."""
    units = sum(spec.axis_size(SITES[site]) for site in sites)
    return 2 * spec.layers * units * sum(length * count for length, count in zip(lengths, rows, strict=True))
