"""Values of a config: a view that checks values and remembers its keys, and settings that many families share."""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from tmjax.errors import InputError
from tmjax.models.families.unread import sort_unread
from tmjax.models.spec import FULL_ATTENTION, DecoderSpec

REQUIRED = object()


#: Type of a config value.
Kind: TypeAlias = type[int] | type[float] | type[bool] | type[str] | type[list] | type[dict]


class ConfigView:
    """Reads a config and remembers which keys were read, so that none is silently without effect."""

    def __init__(self, config: Mapping[str, Any], model_type: str) -> None:
        self._config = config
        self._model_type = model_type
        self._read: set[str] = set()
        self.notes: list[str] = []

    def take(self, key: str, default: Any = REQUIRED, kind: Kind = int, *, zero: bool = False) -> Any:
        """Reads the value of a key.

        Args:
            key: The key.
            default: Value of a missing key or null.
            kind: Type of the value; see `check_kind`.
            zero: Whether zero is allowed.

        Returns:
            The value.

        Raises:
            InputError: The key is missing and has no default, or its value is not of the kind.
        """
        self._read.add(key)
        value = self._config.get(key)
        if value is None:
            if default is REQUIRED:
                raise InputError(f"config.json of type {self._model_type} lacks {key}")
            return default
        check_kind(key, value, kind, zero=zero)
        return value

    def null(self, key: str) -> bool:
        """Returns whether a key is there and null.

        Args:
            key: The key.
        """
        return key in self._config and self._config[key] is None

    def lacks(self, key: str) -> bool:
        """Returns whether a key is missing or null.

        Args:
            key: The key.
        """
        return self._config.get(key) is None

    def is_text(self, key: str) -> bool:
        """Returns whether the value of a key is text.

        Args:
            key: The key.
        """
        return isinstance(self._config.get(key), str)

    def last_layer(self, key: str, layers: int) -> int:
        """Reads the number of a last layer, where -1, null or a missing key is the last of all.

        Args:
            key: The key.
            layers: Number of layers.

        Returns:
            The number.

        Raises:
            InputError: The value is not a whole number.
        """
        if self._config.get(key) == -1:
            self._read.add(key)
            return layers - 1
        return self.take(key, layers - 1, zero=True)

    def note(self, text: str) -> None:
        """Adds a note on a setting without effect.

        Args:
            text: The note.
        """
        self.notes.append(f"config.json: {text}")

    def sort_unread(self, values: Mapping[str, Any]) -> None:
        """Notes the keys that nobody read.

        Args:
            values: Fields of the spec that were read.

        Raises:
            InputError: A key that nobody read could change the forward pass.
        """
        unread = {key: value for key, value in self._config.items() if key not in self._read and value is not None}
        refused, notes = sort_unread(self._model_type, unread, values)
        if refused:
            raise InputError(
                f"config.json of type {self._model_type} has settings that are not supported: {', '.join(refused)}"
            )
        self.notes += notes


def check_kind(key: str, value: Any, kind: Kind, *, zero: bool = False) -> None:
    """Checks the type of a config value; numbers must be finite and positive.

    Args:
        key: The value's key.
        value: The value.
        kind: Its type; `float` takes whole numbers too.
        zero: Whether zero is allowed.

    Raises:
        InputError: The value is not of the kind.
    """
    number = kind in (int, float)
    fits = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    if not fits or (number and not (0 < value < math.inf or (zero and value == 0))):
        name = {int: "a positive whole number", float: "a positive number", bool: "true or false"}
        raise InputError(f"config.json: {key} {value!r} is not {name.get(kind, f'a {kind.__name__}')}")


ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


def read_activation(view: ConfigView, key: str = "hidden_act", default: Any = REQUIRED) -> str:
    """Reads the activation function.

    Args:
        view: The config.
        key: Its key.
        default: Value where the key is missing.

    Returns:
        Name of the function in `DecoderSpec.activation`.

    Raises:
        InputError: The function is not supported.
    """
    name = view.take(key, default, str)
    if name not in ACTIVATION_NAMES:
        raise InputError(f"config.json: {key} {name!r} is not supported; supported are {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[name]


def write_activation(spec: DecoderSpec, key: str = "hidden_act") -> dict[str, Any]:
    """Writes the activation function.

    Args:
        spec: The architecture.
        key: The config's key.

    Returns:
        The key with its Hugging Face name.
    """
    return {key: {ours: hf for hf, ours in reversed(ACTIVATION_NAMES.items())}[spec.activation]}


def attention_biases(view: ConfigView, *, default: bool = False) -> dict[str, Any]:
    """Reads whether q, k, v and o have biases, where one key says so for all.

    Args:
        view: The config.
        default: Value where the key is missing.

    Returns:
        Fields of the spec.
    """
    bias = view.take("attention_bias", default, bool)
    return {"qkv_bias": bias, "o_bias": bias}


def read_windows(
    view: ConfigView, layers: int, size: int | None, kinds: list[str] | None = None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Reads the attention windows of all layers from `layer_types`.

    Args:
        view: The config.
        layers: Number of layers.
        size: Window in tokens; None: no layer has one.
        kinds: Kinds of the layers where the config has none.

    Returns:
        Kind (`sliding_attention`, `full_attention`) and window of every layer; no windows, (), where all are full.

    Raises:
        InputError: `layer_types` does not describe so many layers.
    """
    layer_types = view.take("layer_types", kinds or ["full_attention"] * layers, list)
    if len(layer_types) != layers or not all(kind in ("sliding_attention", "full_attention") for kind in layer_types):
        raise InputError(f"config.json: layer_types {layer_types} does not describe {layers} layers")
    if size is None or "sliding_attention" not in layer_types:
        return tuple(layer_types), ()
    return tuple(layer_types), tuple(size if kind == "sliding_attention" else FULL_ATTENTION for kind in layer_types)


def write_windows(spec: DecoderSpec) -> dict[str, Any]:
    """Writes the attention windows of a spec.

    Args:
        spec: The architecture.

    Returns:
        `layer_types` and `sliding_window`.
    """
    sizes = {window for window in spec.windows if window != FULL_ATTENTION}
    kinds = ["full_attention" if window == FULL_ATTENTION else "sliding_attention" for window in spec.layer_windows]
    return {"sliding_window": max(sizes, default=None), "layer_types": kinds}
