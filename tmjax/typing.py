"""Array aliases and the axis letters used in names and docstrings.

Axis letters: B batch of token sequences, T tokens, R pooled rows of a batch, N rows of a whole text set, L target
layers, M source layers, S stacked layers of either model, n target units, k source units, V vocabulary, D documents.
A trailing `_bt` on a name says that its axes are [B, T].
"""

from collections.abc import Mapping
from typing import TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.Array | np.ndarray
#: Parameters of one model: flat, keyed by dotted Flax path, block parameters stacked on a leading layer axis.
Params: TypeAlias = Mapping[str, ArrayLike]
