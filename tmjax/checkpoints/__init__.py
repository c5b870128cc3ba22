"""Checkpoints: Hugging Face and orbax directories, both ways, derived from the families' ParamSpec tables."""
