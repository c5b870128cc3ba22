"""`tmjax run`: the steps of a recipe, each by the command of its kind, as one run directory."""
