"""What a model is worth on held-out text, with intervals and controls."""
