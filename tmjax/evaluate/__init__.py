"""Evaluation of models on held-out text and tasks, with intervals and controls."""
