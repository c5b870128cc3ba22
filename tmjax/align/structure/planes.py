"""Rotary planes of two models: which turn alike, and the maps between them that commute with turning.

The attention logit q . k does not change under q -> C q, k -> C^-T k. Rotary embedding turns every plane by its own
frequency, so C must map planes to planes of the same frequency by some a I + b J, a rotation times a length rho. Here
the rotation is shared by q and k, and q is stretched by rho, k by 1 / rho. Dimensions that do not turn (frequency 0)
may be mapped freely: one to one, with sign and rho.
"""

import functools
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from tmjax.models.rotary import inverse_frequencies
from tmjax.models.spec import Rotary


@dataclass(frozen=True)
class Planes:
    """Dimensions of a head: `pairs` [P, 2] with their `frequencies` [P], and `still` [F], which do not turn."""

    pairs: np.ndarray
    frequencies: np.ndarray
    still: np.ndarray


@functools.cache
def planes_of(rotary: Rotary, head_dim: int) -> Planes:
    """The planes of a head."""
    dims = rotary.dims(head_dim)
    frequencies = inverse_frequencies(rotary, head_dim).astype(np.float64)
    order = np.arange(dims)
    pairs = order.reshape(-1, 2) if rotary.interleaved else order.reshape(2, -1).T
    turning = frequencies > 0
    still = np.concatenate([pairs[~turning].reshape(-1), np.arange(dims, head_dim)])
    return Planes(pairs[turning], frequencies[turning], np.sort(still))


@dataclass(frozen=True)
class PlaneMatch:
    """Matched planes [p, 2] of a target head and a source head, and the still dimensions of both."""

    target: np.ndarray
    source: np.ndarray
    target_still: np.ndarray
    source_still: np.ndarray

    @classmethod
    def of(cls, target: Planes, source: Planes) -> "PlaneMatch":
        """One to one, at the least total |ln f - ln f'|; planes of the richer side are left over."""
        distance = np.abs(np.log(target.frequencies)[:, None] - np.log(source.frequencies)[None, :])
        rows, columns = linear_sum_assignment(distance)
        return cls(target.pairs[rows], source.pairs[columns], target.still, source.still)

    def products(self, cov_hdgd: np.ndarray) -> np.ndarray:
        """Complex products [p, H, G] of matched planes from covariances [H, d, G, d']: sum of z_target conj(z_source).

        z is the first dimension of a plane plus i times the second. The argument is the angle from source to target.
        """

        def part(t: int, s: int) -> np.ndarray:
            return cov_hdgd[:, self.target[:, t], :, self.source[:, s]]

        return part(0, 0) + part(1, 1) + 1j * (part(1, 0) - part(0, 1))

    def still_products(self, cov_hdgd: np.ndarray) -> np.ndarray:
        """Covariances [H, G, f, f'] of the still dimensions."""
        return cov_hdgd[:, self.target_still][..., self.source_still].transpose(0, 2, 1, 3)

    def similarity(self, cov_hdgd: np.ndarray, size_hd: np.ndarray, source_size_gd: np.ndarray) -> np.ndarray:
        """Similarity of heads [H, G] in [0, 1], invariant to the planes' angles and the order of still dimensions.

        `size` are the units' scales. The similarity of heads that are equal up to rotations of their planes is 1.
        """
        magnitude = np.abs(self.products(cov_hdgd)).sum(axis=0)
        if len(self.target_still) and len(self.source_still):
            still = np.abs(self.still_products(cov_hdgd))
            magnitude += np.minimum(still.max(axis=3).sum(axis=2), still.max(axis=2).sum(axis=2))
        whole = np.sqrt(np.square(size_hd).sum(1)[:, None] * np.square(source_size_gd).sum(1)[None, :])
        return np.clip(magnitude / np.where(whole > 0, whole, 1.0), 0.0, 1.0)


def _ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(y > 0, x / np.where(y > 0, y, 1.0), 0.0)


def stretch(target: tuple[np.ndarray, np.ndarray], source: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """rho = sqrt((|q_T| / |q_S|) / (|k_T| / |k_S|)) from sizes (q, k) of both sides; 1 where one of them is 0."""
    ratio = _ratio(target[0] * source[1], source[0] * target[1])
    return np.sqrt(np.where(ratio > 0, ratio, 1.0))


def plane_map(
    match: PlaneMatch,
    shape: tuple[int, int],
    angles_p: np.ndarray,
    rho_p: np.ndarray,
    still: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> np.ndarray:
    """The map C [d, d'] of a head: rotations by `angles_p` times `rho_p`; still dimensions (rows, columns, factor)."""
    block = np.zeros(shape)
    for (a, b), (s, t), angle, rho in zip(match.target, match.source, angles_p, rho_p, strict=True):
        cos, sin = rho * np.cos(angle), rho * np.sin(angle)
        block[[a, a, b, b], [s, t, s, t]] = cos, -sin, sin, cos
    rows, columns, factor = still
    block[rows, columns] = factor
    return block
