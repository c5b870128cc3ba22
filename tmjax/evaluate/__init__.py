"""What a model is worth on held-out text, with intervals and controls."""

import sys

import tmjax

sys.modules[__name__].__class__ = tmjax.CallablePackage
