"""The vocabulary of sites: the named places of a decoder block where activations are captured and layers aligned.

Every family's forward is the one `Decoder`, so models have the same sites, but for those inside an MLP that is plain or
a mixture of experts, and inside a latent attention (`DecoderSpec.sites`). The value is the logical axis of the site's
units; its size comes from `DecoderSpec.axis_size`.
"""

from collections.abc import Mapping

SITES: Mapping[str, str] = {
    "attn_in": "embed",  # normed input of q, k, v
    "q": "heads",  # before the rotary embedding
    "k": "kv_heads",
    "v": "kv_heads",
    "attn_mix": "heads",  # input of o
    "attn_out": "embed",  # output of o, before it is added to the residual stream
    "mlp_in": "embed",
    "gate": "mlp",  # before the activation function
    "up": "mlp",
    "mlp_hidden": "mlp",  # input of down
    "mlp_out": "embed",
    "resid": "embed",  # residual stream after the block
}
#: Sites of the units of an MLP, which a mixture of experts does not have.
INNER_SITES = ("gate", "up", "mlp_hidden")
#: Sites of the heads of an attention, which one with latent keys and values does not have.
HEAD_SITES = ("q", "k", "v", "attn_mix")
