"""Training of our decoders: batches, losses, modes, guidance by a source's features, checkpoints."""

import sys

import tmjax

sys.modules[__name__].__class__ = tmjax.CallablePackage
