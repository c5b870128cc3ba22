"""Containers of tensors: safetensors, PyTorch files, orbax arrays, and the names in them."""
