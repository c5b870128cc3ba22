"""Activations of every site, pooled to rows that pair the same piece of text in both models."""
