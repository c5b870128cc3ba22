"""Recipes: the settings of a run as frozen, checked objects."""
