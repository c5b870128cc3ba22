"""BASELINE, not part of tmjax: the streaming log-domain Sinkhorn of the authors' code, rewritten from its description.

PyTorch float32, potentials updated by log-sum-exp over column blocks of 2048, marginal error looked at every 10
iterations. The description's loop has no more; what it leaves open is done in the way that favours the baseline.
"""

import math

import torch

BLOCK = 2048
CHECK_EVERY = 10


def _row_lse(cost: torch.Tensor, g: torch.Tensor, epsilon: float) -> torch.Tensor:
    """log sum_k exp((g - cost) / epsilon) per row [n], one column block at a time."""
    total = torch.full((cost.shape[0],), -math.inf)
    for start in range(0, cost.shape[1], BLOCK):
        block = (g[start : start + BLOCK] - cost[:, start : start + BLOCK]) / epsilon
        total = torch.logaddexp(total, torch.logsumexp(block, dim=1))
    return total


def _column_lse(cost: torch.Tensor, f: torch.Tensor, epsilon: float) -> torch.Tensor:
    """log sum_n exp((f - cost) / epsilon) per column [k], one column block at a time."""
    blocks = range(0, cost.shape[1], BLOCK)
    return torch.cat([torch.logsumexp((f[:, None] - cost[:, i : i + BLOCK]) / epsilon, dim=0) for i in blocks])


def streaming_sinkhorn(
    cost: torch.Tensor, epsilon: float, threshold: float, max_iterations: int = 2000
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Potentials f [n], g [k] and iterations for a cost [n, k] with uniform marginals."""
    n, k = cost.shape
    f, g = torch.zeros(n), torch.zeros(k)
    for iteration in range(1, max_iterations + 1):
        f = -epsilon * (_row_lse(cost, g, epsilon) + math.log(n))
        g = -epsilon * (_column_lse(cost, f, epsilon) + math.log(k))
        if iteration % CHECK_EVERY == 0:
            # The columns are exact after the update of g; the rows are not yet.
            rows = torch.exp(f / epsilon + _row_lse(cost, g, epsilon))
            if float((rows - 1 / n).abs().sum()) < threshold:
                break
    return f, g, iteration
