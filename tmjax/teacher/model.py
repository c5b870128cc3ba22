"""The model that is asked: parameters, tokenizer, and how it is computed."""

from dataclasses import dataclass, field
from typing import Self

import jax.numpy as jnp

from tmjax.checkpoints.model import Model
from tmjax.models.spec import DecoderSpec
from tmjax.sharding.mesh import Layout
from tmjax.text.tokenizer import TextTokenizer, load_tokenizer
from tmjax.typing import Params


@dataclass(frozen=True)
class Teacher:
    """A model whose predictions, texts or features are wanted.

    Attributes:
        spec: Its architecture.
        params: Its parameters, placed on the devices of `layout`.
        tokenizer: Its tokenizer.
        dtype: The dtype of forward passes.
        layout: The device mesh.
    """

    spec: DecoderSpec
    params: Params
    tokenizer: TextTokenizer
    dtype: jnp.dtype = jnp.float32
    layout: Layout = field(default_factory=Layout)

    @classmethod
    def of(
        cls,
        model: Model,
        params: Params | None = None,
        *,
        dtype: jnp.dtype = jnp.float32,
        layout: Layout | None = None,
    ) -> Self:
        """Makes a teacher of a loaded model.

        Args:
            model: Architecture and tokenizer, and the parameters unless others are given.
            params: Other parameters of the same architecture.
            dtype: The dtype of forward passes.
            layout: The device mesh; one device unless given.

        Returns:
            The teacher.
        """
        tokenizer = load_tokenizer(model.directory, model.spec.vocab)
        return cls(model.spec, model.params if params is None else params, tokenizer, dtype, layout or Layout())
