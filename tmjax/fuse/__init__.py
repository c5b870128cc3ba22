"""From an alignment and two models to new target parameters, with a table of what came from the source."""

import sys

import tmjax

sys.modules[__name__].__class__ = tmjax.CallablePackage
