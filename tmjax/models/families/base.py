"""The parts of a family: a table from config keys to `DecoderSpec` and a table from tensor names to parameters.

This folder is the only place where Hugging Face names appear.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from tmjax.errors import InputError
from tmjax.models.families.config_values import REQUIRED, ConfigView, Kind
from tmjax.models.families.quantised import refuse_quantised
from tmjax.models.spec import DecoderSpec, ParamSpec

#: Endings of the names of buffers (of any dtype) that old checkpoints hold beside their parameters; recomputed here.
BUFFERS = (
    ".rotary_emb.inv_freq",
    ".attention.bias",
    ".attention.masked_bias",
    ".attn.bias",
    ".attn.masked_bias",
)


@dataclass(frozen=True)
class Field:
    """A config key that is one field of the spec; `default` is a value or a function of the config so far read."""

    key: str
    attribute: str
    default: Any = REQUIRED
    kind: Kind = int


@dataclass(frozen=True)
class Family:
    """One Hugging Face `model_type`.

    `fields` are the config keys that map one to one, `fixed` what the family never varies, `read` and `write` what
    takes more than a table (rotary settings, windows), `params` the tensor table. `further` are beginnings of names of
    tensors that predict tokens beyond the next one, which are not read; `{layers}` stands for the number of layers.
    """

    model_type: str
    architecture: str
    fields: tuple[Field, ...]
    params: Callable[[DecoderSpec], tuple[ParamSpec, ...]]
    fixed: Mapping[str, Any]
    read: Callable[["ConfigView", dict[str, Any]], dict[str, Any]]
    write: Callable[[DecoderSpec], dict[str, Any]]
    further: tuple[str, ...] = ()

    def spec(self, config: Mapping[str, Any]) -> DecoderSpec:
        """Reads the architecture of a config.

        Args:
            config: Content of `config.json`.

        Returns:
            The spec.

        Raises:
            InputError: As `read_config` raises it.
        """
        return self.read_config(config)[0]

    def read_config(self, config: Mapping[str, Any]) -> tuple[DecoderSpec, tuple[str, ...]]:
        """Reads a config.

        Args:
            config: Content of `config.json`.

        Returns:
            The spec, and notes on settings without effect.

        Raises:
            InputError: The weights are quantised, or a key is missing, has a value that is not supported, or could
                change the forward pass and is read by no field of the family.
        """
        refuse_quantised(config)
        view = ConfigView(config, self.model_type)
        values = dict(self.fixed)
        for item in self.fields:
            default = item.default(values) if callable(item.default) else item.default
            values[item.attribute] = view.take(item.key, default, item.kind)
        values |= self.read(view, values)
        view.sort_unread(values)
        spec = DecoderSpec(**values)
        _check(spec)
        return spec, (*self._unusual_class(config), *view.notes)

    def _unusual_class(self, config: Mapping[str, Any]) -> list[str]:
        named = config.get("architectures")
        named = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
        if not named or self.architecture in named:
            return []
        return [f"config.json: the checkpoint is of {', '.join(named)}; it is read as {self.architecture}"]

    def config(self, spec: DecoderSpec) -> dict[str, Any]:
        """Writes the config of a spec: the inverse of `spec`, from the same table.

        Args:
            spec: The architecture.

        Returns:
            Content of `config.json`.

        Raises:
            InputError: A config of this family cannot say something of the spec.
        """
        values = {item.key: getattr(spec, item.attribute) for item in self.fields}
        result = {"architectures": [self.architecture], "model_type": self.model_type} | values | self.write(spec)
        if self.spec(result) != spec:
            different = [f.name for f in fields(spec) if getattr(spec, f.name) != getattr(self.spec(result), f.name)]
            raise InputError(f"a {self.model_type} config cannot say {', '.join(different)} of this model")
        return result


def _check(spec: DecoderSpec) -> None:
    if spec.heads % spec.kv_heads:
        raise InputError(f"config.json: {spec.heads} query heads cannot share {spec.kv_heads} key-value heads")
    dims = spec.rotary.dims(spec.head_dim)
    if spec.rotary.scaling != "none" and (dims % 2 or dims < 2):
        raise InputError(f"config.json: rotary embedding needs an even number of dimensions, not {dims}")
    for factors in (spec.rotary.short_factors, spec.rotary.long_factors):
        if spec.rotary.scaling == "longrope" and len(factors) != dims // 2:
            raise InputError(f"config.json: {len(factors)} rotary factors for {dims // 2} planes")
    if spec.latent is not None and spec.latent.value_dim > spec.head_dim:
        raise InputError(
            f"config.json: latent attention with values of {spec.latent.value_dim} units in heads of {spec.head_dim} is"
            " not supported"
        )
    experts = spec.experts
    if experts is not None:
        chosen, count, groups, opened = experts.chosen, experts.count, experts.groups, experts.chosen_groups
        if count % groups or opened > groups or chosen > count // groups * opened:
            raise InputError(
                f"config.json: {chosen} of {count} experts cannot be chosen from {opened} of {groups} groups"
            )
    if experts is not None and len(experts.dense) >= spec.layers:
        raise InputError("config.json: none of the layers has experts")
    if spec.windows and len(spec.windows) != spec.layers:
        raise InputError(f"config.json: {len(spec.windows)} attention windows for {spec.layers} layers")
