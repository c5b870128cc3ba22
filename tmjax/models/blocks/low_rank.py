"""Description of an attention whose keys and values have a low rank (`Latent`)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Indexer:
    """Sparse attention to the `chosen` tokens that an indexer of some `heads` of `dim` units ranks highest.

    Texts of at most `chosen` tokens are attended to in full, whatever the ranks. Longer ones are not read, so the
    indexer's parameters are kept and never used. `layers` are those with an indexer of their own; the others take over
    what the layer before them chose.
    """

    chosen: int
    heads: int
    dim: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-AI 2024): keys and values of all heads out of `kv_rank` normed units.

    `rotary_dim` units of every head turn with the position; in the keys they are the same for all heads. Values have
    `value_dim` units a head. Queries come out of `q_rank` normed units, or straight out of the stream if it is 0. With
    `mscale` scores are multiplied by (1 + 0.1 mscale ln f)^2, f the factor of the rotary scaling (YaRN). Keys and
    values of every head are computed for each token, so that caches hold them as those of any other attention.
    """

    kv_rank: int
    rotary_dim: int
    value_dim: int
    q_rank: int = 0
    mscale: float = 0.0
    indexer: Indexer | None = None
