"""Hugging Face, orbax and Flax, both ways, all derived from the ParamSpec tables."""
