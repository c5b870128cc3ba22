"""Bootstrap over seeds and documents, for experiments that run every arm under several seeds."""

import numpy as np


def draws(values_sda: np.ndarray, size_d: np.ndarray, count: int = 4000) -> np.ndarray:
    """Bits per byte [draws, arms] of bits [seed, document, arm], seeds and documents drawn with replacement."""
    seeds, documents, _ = values_sda.shape
    generator = np.random.default_rng(0)
    result = []
    for _ in range(count):
        of_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds)) / seeds
        of_document = generator.multinomial(documents, np.full(documents, 1 / documents))
        result.append(np.einsum("s,d,sda->a", of_seed, of_document, values_sda, optimize=True) / (of_document @ size_d))
    return np.stack(result)
