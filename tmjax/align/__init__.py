"""Which units and layers of the source correspond to which of the target, with certificates."""

import sys

import tmjax

sys.modules[__name__].__class__ = tmjax.CallablePackage
