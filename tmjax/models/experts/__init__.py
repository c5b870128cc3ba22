"""Mixtures of experts: their description, the expert layer, and products of rows grouped by expert."""
