"""`tmjax solvers`."""
