"""Sharpness of the plans of an alignment, and the heads that they match."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from tmjax.align.alignment import Alignment
from tmjax.align.site_plans import SitePlans

#: Sizes of the sets of partners whose share is reported.
TOP = (1, 8, 64)
#: Sites whose units lie in heads, and the count of heads that is theirs.
HEAD_SITES: Mapping[str, str] = {"q": "heads", "k": "kv_heads", "v": "kv_heads"}


def heaviest(alignment: Alignment, plans: SitePlans) -> list[tuple[int, int]]:
    """Pairs every target layer with the stored source layer of the largest weight; layers without one are left out.

    One pair a layer, because rebuilding all plans of a large model takes as long as solving them.
    """
    weight = np.mean([np.asarray(plan.weights) for plan in alignment.layer_plans.values()], axis=0)
    stored = np.asarray(plans.index) >= 0
    return [
        (layer, int(np.argmax(np.where(row, weight[layer], -1.0)))) for layer, row in enumerate(stored) if row.any()
    ]


def row_shares(plans: SitePlans, layer: int, source_layer: int) -> np.ndarray:
    """|Q| [n, k] of one pair, every row scaled to sum 1 (rows without mass stay zero); float32."""
    plan = plans.pair(layer, source_layer)[0]
    mass = np.asarray(jnp.abs(plan.matrix()) if plans.real_units else plan.magnitude(), np.float32)
    total = mass.sum(axis=1, keepdims=True)
    return np.divide(mass, total, out=np.zeros_like(mass), where=total > 0)


def concentration(alignment: Alignment) -> dict[str, dict[str, float]]:
    """Measures per plan site: units of both sides, mean share of a unit's mass on its `TOP` partners, and `partners`.

    `partners` is the exponential of the mean entropy of a target unit's shares: 1 for a matching, k for a uniform plan.
    Only the heaviest pair of every target layer counts.
    """
    result = {}
    for site, plans in alignment.plans.items():
        sums = np.zeros(len(TOP) + 1)
        count, width = 0, (0, 0)
        for pair in heaviest(alignment, plans):
            shares = row_shares(plans, *pair)
            shares, width = shares[shares.sum(axis=1) > 0], shares.shape
            falling = -np.sort(-shares, axis=1)
            logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
            sums += [*(falling[:, :k].sum() for k in TOP), -np.sum(shares * logs)]
            count += len(shares)
        means = sums / max(count, 1)
        result[site] = {"target_units": width[0], "source_units": width[1]}
        result[site] |= {f"top_{k}": float(value) for k, value in zip(TOP, means, strict=False)}
        result[site]["partners"] = float(np.exp(means[-1]))
    return result


def head_shares(
    alignment: Alignment, target: Mapping[str, int], source: Mapping[str, int]
) -> dict[str, list[tuple[int, int, np.ndarray]]]:
    """Lists per head site: (target layer, source layer, share [H, H'] of each target head's mass on source heads).

    `target` and `source` count `heads` and `kv_heads`. Only the heaviest pair of every target layer is listed.
    """
    result = {}
    for site, count in HEAD_SITES.items():
        if site not in alignment.plans:
            continue
        plans, blocks = alignment.plans[site], []
        for layer, other in heaviest(alignment, plans):
            shares = row_shares(plans, layer, other)
            heads = shares.reshape(target[count], -1, source[count], shares.shape[1] // source[count])
            mass = heads.sum(axis=(1, 3))
            total = mass.sum(axis=1, keepdims=True)
            blocks.append((layer, other, np.divide(mass, total, out=np.zeros_like(mass), where=total > 0)))
        result[site] = blocks
    return result
