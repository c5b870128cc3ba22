"""Correspondence of units and layers between source and target, with certificates."""
