"""A PEFT adapter (LoRA, rsLoRA, DoRA) folded into its base model's weights as they are read, a slice at a time.

With matrices A [r, in] and B [out, r] a weight becomes W + s B A, where s = alpha / r, or alpha / sqrt(r) for rsLoRA
(Kalajdzievski 2023, arXiv:2312.03732). DoRA (Liu et al. 2024, arXiv:2402.09353) then scales every output row to a
length of its own. Embeddings have A and B the other way round. Whole tensors that were trained beside (biases,
`modules_to_save`) replace those of the base.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tmjax.checkpoints.formats.safetensors import Weights, read_header, read_one
from tmjax.errors import CheckpointError, InputError, summarise
from tmjax.files.jsonfile import read_json

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: What PEFT puts before the names of the base model.
ADAPTER_PREFIX = "base_model.model."
#: Endings of the names of an adapter's tensors, and what each is of a module.
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
}
#: Settings that change the meaning of the matrices and are not read, with the values that switch them off.
_OFF: Mapping[str, tuple[Any, ...]] = {
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "megatron_config": (None,),
}


@dataclass(frozen=True)
class Update:
    """The matrices of one module, names in the adapter's file, and the scale s; `magnitude` is DoRA's."""

    a: str
    b: str
    scale: float
    magnitude: str | None = None


class Adapter:
    """An adapter directory: settings, and the tensors of every module.

    Args:
        directory: The directory.

    Raises:
        InputError: It is no adapter of a kind that is read.
        CheckpointError: Its tensors are damaged or incomplete.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.config: dict[str, Any] = read_json(self.directory / ADAPTER_CONFIG)
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise InputError(f"{self.directory} is an adapter of the kind {kind}; LoRA, rsLoRA and DoRA are read")
        on = [name for name, off in _OFF.items() if self.config.get(name) not in off]
        if on:
            raise InputError(
                f"{self.directory}: {summarise(on)} of {ADAPTER_CONFIG} is not supported; fold the adapter"
            )
        file = self.directory / ADAPTER_WEIGHTS
        if not file.is_file():
            raise InputError(f"{self.directory} has no {ADAPTER_WEIGHTS}; save the adapter as safetensors")
        self._tensors = read_header(file)

    @property
    def base(self) -> str | None:
        """The base model that the adapter names."""
        base = self.config.get("base_model_name_or_path")
        return base if isinstance(base, str) and base else None

    @property
    def note(self) -> str:
        """What a user should know of such a checkpoint."""
        kind = "DoRA" if self.config.get("use_dora") else "rsLoRA" if self.config.get("use_rslora") else "LoRA"
        return f"the adapter ({kind}) of {self.directory.name} is folded into its base model {self.base}"

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads a tensor of the adapter, or `tensor[index]`."""
        return read_one(self._tensors[name], index)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor of the adapter."""
        return self._tensors[name].shape

    def updates(self) -> tuple[dict[str, Update], dict[str, str]]:
        """Returns the updates by the name of the weight, and whole tensors by the name that they replace.

        Raises:
            CheckpointError: A module lacks one of its matrices, or a name is not understood.
        """
        modules: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        for name in self._tensors:
            plain = name.removeprefix(ADAPTER_PREFIX)
            ending = next((end for end in _PARTS if plain.endswith(end)), None)
            if ending is not None:
                modules.setdefault(plain.removesuffix(ending), {})[_PARTS[ending]] = name
            elif ".lora_" in plain:
                raise CheckpointError(f"{self.directory / ADAPTER_WEIGHTS}: tensor {name} is not understood")
            else:
                plain = plain.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
                whole[plain.replace(".base_layer.", ".")] = name
        result = {}
        for module, parts in modules.items():
            embedding = "embedding_" if "embedding_a" in parts or "embedding_b" in parts else ""
            a, b = parts.get(f"{embedding}a"), parts.get(f"{embedding}b")
            if a is None or b is None or bool(self.config.get("use_dora")) != ("magnitude" in parts):
                raise CheckpointError(f"{self.directory / ADAPTER_WEIGHTS}: module {module} lacks a part of its update")
            rank = self.shape(a)[0]
            alpha = self._alpha(module)
            scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
            if embedding:  # W^T + s B A, so as a weight [vocab, embed] A^T is the left factor
                a, b = b, a
            result[f"{module}.weight"] = Update(a, b, scale, parts.get("magnitude"))
        return result, whole

    def _alpha(self, module: str) -> float:
        """The alpha of a module: of the first pattern that its name ends in, else that of all."""
        patterns = self.config.get("alpha_pattern") or {}
        named = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
        return (
            float(patterns[key]) if (key := next(named, None)) is not None else float(self.config.get("lora_alpha", 8))
        )


class Folded(Weights):
    """The tensors of a base model with an adapter folded in.

    Args:
        weights: The base model, under the names of its family's table.
        adapter: The adapter.

    Raises:
        CheckpointError: The adapter has tensors that the base model lacks, or of other shapes.
    """

    def __init__(self, weights: Weights, adapter: Adapter) -> None:
        self.directory = weights.directory
        self._weights, self._adapter = weights, adapter
        self._updates, self._whole = adapter.updates()
        self._transposed = bool(adapter.config.get("fan_in_fan_out"))
        names = [*self._updates, *self._whole]
        unknown = [name for name in names if name not in weights]
        if unknown:
            raise CheckpointError(f"{adapter.directory}: the base model has no {summarise(unknown)}")
        self._tensors = dict(weights.items())
        shapes = [(name, self._update_shape(name)) for name in self._updates]
        shapes += [(name, adapter.shape(stored)) for name, stored in self._whole.items()]
        wrong = [name for name, shape in shapes if shape != weights[name].shape]
        if wrong:
            raise CheckpointError(f"{adapter.directory}: the base model has other shapes of {summarise(wrong)}")

    def _flips(self, name: str) -> bool:
        """Whether a weight is stored [in, out]; an embedding is as its update gives it."""
        update = self._updates[name]
        return self._transposed and ".lora_embedding_" not in update.a

    def _update_shape(self, name: str) -> tuple[int, ...]:
        update = self._updates[name]
        a, b = self._adapter.shape(update.a), self._adapter.shape(update.b)
        if ".lora_embedding_" in update.a:  # left factor B^T [vocab, r] was A; right factor is B^T
            return b[1], a[0]
        return (a[1], b[0]) if self._flips(name) else (b[0], a[1])

    def _factors(self, update: Update) -> tuple[np.ndarray, np.ndarray]:
        """Left [rows, r] and right [r, columns] factors of an update, float32."""
        a, b = (self._adapter.read(name).astype(np.float32) for name in (update.a, update.b))
        return (b.T, a.T) if ".lora_embedding_" in update.a else (b, a)

    def _base(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads a tensor before its update: the adapter's own copy, if it has one, else the base model's."""
        if name not in self._whole:
            return self._weights.read(name, index)
        return self._adapter.read(self._whole[name], index).astype(self[name].dtype)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads a tensor, or `tensor[index]`, into an array of its own. Raises CheckpointError."""
        update = self._updates.get(name)
        if update is None:
            return self._base(name, index)
        left, right = self._factors(update)
        flips = self._flips(name)
        rows, columns = (*index, slice(None), slice(None))[:2]
        if update.magnitude is None:
            values = self._base(name, index).astype(np.float32)
            change = (right.T[rows] @ left.T[:, columns]) if flips else (left[rows] @ right[:, columns])
            return (values + np.float32(update.scale) * change).astype(self[name].dtype)
        # The length of an output row takes all of its inputs.
        outputs = columns if flips else rows
        whole = self._base(name) if flips else self._base(name, (rows,))
        values = whole[:, outputs].T if flips else whole
        values = values.astype(np.float32) + np.float32(update.scale) * (left[outputs] @ right)
        magnitude = self._adapter.read(update.magnitude).astype(np.float32).reshape(-1)[outputs]
        values *= (magnitude / np.linalg.norm(values, axis=1))[:, None]
        result = values.T[rows] if flips else values[:, columns]
        return result.astype(self[name].dtype)
