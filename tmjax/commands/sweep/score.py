"""Scoring of many coefficients at once: one compiled program fuses and scores a batch of settings.

Settings are split over devices. A device scores its settings in turn, or a few at a time where memory and hardware
allow it, and reads the packed texts chunk by chunk.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tmjax.checkpoints.model import Model
from tmjax.evaluate.bits import Scores, windows
from tmjax.evaluate.packing import LOGIT_NODES, pack, packed_nll
from tmjax.models.packed import Packed
from tmjax.sharding.hosts import to_host
from tmjax.sharding.mesh import AXES, Layout
from tmjax.text.documents import Texts
from tmjax.text.tokenizer import TextTokenizer
from tmjax.text.unknown import hidden_nats
from tmjax.transfer.contribution import Coefficients, Contribution, Rule
from tmjax.typing import Array, Params

#: Nodes per chunk on a CPU: its caches have room for their activations.
CPU_TOKENS = 1536
#: Memory that settings scored at once by one accelerator may take, beyond the first.
ACCELERATOR_BYTES = 2**32
#: A batch is about this many floating-point operations per device: seconds, after which results are kept and shown.
BATCH_OPERATIONS = 2e11
MAX_AT_ONCE = 16


def _roles(contributions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the roles of all contributions, in the order of their coefficients."""
    return sorted(role for items in contributions for role in items)


class SettingsScorer:
    """Scores texts, packed and placed once, under many coefficients of one transport at a time.

    At most `max_settings` settings are expected in all. Settings are split over the data axis of `layout`; its other
    axes split the parameters, as elsewhere. With `stored`, fused parameters are first rounded to the target's dtypes,
    as in the written checkpoint.
    """

    def __init__(
        self,
        target: Model,
        tokenizer: TextTokenizer,
        texts: Texts,
        *,
        max_settings: int,
        batch_tokens: int = 4096,
        max_tokens: int | None = None,
        dtype: jnp.dtype = jnp.float32,
        layout: Layout | None = None,
        stored: bool = False,
    ) -> None:
        self.target, self.dtype, self.stored = target, dtype, stored
        mesh = (layout or Layout()).mesh
        if mesh is None:
            mesh = Mesh(np.asarray(jax.local_devices()[:1]), AXES[:1], axis_types=(AxisType.Auto,))
        self._mesh, self._axis = mesh, AXES[0]
        self._cut = windows(target.spec, tokenizer, texts, max_tokens)
        cpu = mesh.devices.flat[0].platform == "cpu"
        tokens = min(batch_tokens, CPU_TOKENS) if cpu else batch_tokens
        self._chunks = pack(target.spec, [ids for _, ids in self._cut.pieces], chunk_tokens=tokens)
        self._placed = self._everywhere(self._chunks.packed)
        self._params = {
            path: value if getattr(value.sharding, "mesh", None) == mesh else self._everywhere(value)
            for path, value in target.params.items()
        }
        self._at_once = 1 if cpu else self._settings_in_memory()
        operations = 2 * target.size * self._chunks.packed.ids.size
        #: Devices that settings are split over.
        self.devices = mesh.shape[self._axis]
        limit = min(MAX_AT_ONCE, max(self._at_once, 1, round(BATCH_OPERATIONS / operations)))
        #: Settings per call. Smaller batches are padded, so that there is one shape, the best fit to `max_settings`.
        self.batch = self.devices * min(
            range(-(-limit // 2), limit + 1),
            key=lambda each: (-(-max_settings // (each * self.devices)) * each, -each),
        )
        self._programs: dict[Any, Callable[..., Array]] = {}
        self.compile_seconds = 0.0

    def _settings_in_memory(self) -> int:
        spec, nodes = self.target.spec, self._chunks.packed.ids.shape[-1]
        size = 4 * (self.target.size + nodes * (3 * spec.mlp + 8 * spec.hidden) + 2 * LOGIT_NODES * spec.vocab)
        return int(min(MAX_AT_ONCE, max(1, ACCELERATOR_BYTES // size)))

    def _everywhere(self, tree: object) -> object:
        return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec()))

    def place(self, contributions: Sequence[Contribution]) -> tuple[Contribution, ...]:
        """Puts contributions on every device that scores."""
        return tuple(replace(each, items=self._everywhere(dict(each.items))) for each in contributions)

    def _program(self, rules: tuple[Rule, ...], arguments: tuple[Any, ...]) -> Callable[..., Array]:
        leaves, structure = jax.tree.flatten(arguments)
        shape = (rules, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if shape not in self._programs:
            started = time.perf_counter()
            whole, split = PartitionSpec(), PartitionSpec(self._axis)
            # The compiler handles axes that parameters are split over (fsdp, tensor).
            program = jax.shard_map(
                functools.partial(self._score, rules=rules),
                mesh=self._mesh,
                in_specs=(whole, whole, whole, split),
                out_specs=split,
                axis_names={self._axis},
                check_vma=False,
            )
            self._programs[shape] = jax.jit(program).lower(*arguments).compile()
            self.compile_seconds += time.perf_counter() - started
        return self._programs[shape]

    @property
    def compilations(self) -> int:
        """Number of compiled programs: one per kind of transport (its roles, with or without biases)."""
        return len(self._programs)

    def _score(
        self,
        params: Params,
        contributions: tuple[Any, ...],
        packed: Packed,
        pairs_sr2: Array,
        *,
        rules: tuple[Rule, ...],
    ) -> Array:
        """Sums losses [S, C, B] of the texts in all chunks under every setting."""

        def one(pairs_r2: Array) -> Array:
            pairs = {
                role: (pairs_r2[number, 0], pairs_r2[number, 1]) for number, role in enumerate(_roles(contributions))
            }
            fused = params
            for rule, items in zip(rules, contributions, strict=True):
                fused = rule(fused, items, pairs)
            if self.stored:
                fused = {path: value.astype(params[path].dtype) for path, value in fused.items()}
            return jax.lax.map(lambda chunk: packed_nll(self.target.spec, fused, chunk, self.dtype), packed)

        return jax.lax.map(one, pairs_sr2, batch_size=self._at_once if self._at_once > 1 else None)

    def __call__(self, contributions: Sequence[Contribution], settings: Sequence[Coefficients]) -> np.ndarray:
        """Computes negative log-likelihoods [S, D] of documents under settings: nats, hidden bytes charged, float64.

        `settings` are at most `batch`, each with the coefficients of every role of the contributions (see `place`).
        """
        items, rules = tuple(each.items for each in contributions), tuple(each.rule for each in contributions)
        values = np.asarray([[pairs[role] for role in _roles(items)] for pairs in settings], np.float32)
        filled = np.concatenate([values, np.repeat(values[-1:], self.batch - len(values), axis=0)])
        placed = jax.device_put(filled, NamedSharding(self._mesh, PartitionSpec(self._axis)))
        arguments = (self._params, items, self._placed, placed)
        sums = self._program(rules, arguments)(*arguments)
        sums = self._chunks.sums(to_host(sums).astype(np.float64), len(self._cut.pieces))[: len(values)]
        nll = np.zeros((len(values), len(self._cut.bytes)))
        np.add.at(nll, (slice(None), [document for document, _ in self._cut.pieces]), sums)
        return nll + hidden_nats(self._cut.hidden.unknown)

    def scores(self, nll: np.ndarray) -> Scores:
        """Makes the scores of one setting from its `nll` [D]."""
        return Scores(nll, self._cut.bytes, self._cut.tokens, self._cut.hidden)

    def bits_per_byte(self, nll: np.ndarray) -> np.ndarray:
        """Computes bits per byte [S] of `nll` [S, D]."""
        return nll.sum(axis=-1) / math.log(2) / self._cut.bytes.sum()
