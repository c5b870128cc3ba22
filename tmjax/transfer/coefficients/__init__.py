"""Choosing alpha and beta of transported tensors on validation text."""
