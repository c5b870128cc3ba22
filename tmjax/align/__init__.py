"""Which units and layers of the source correspond to which of the target, with certificates."""
