"""Alignments that keep the structure of attention heads, rotary planes and the residual stream."""
