"""`tmjax sweep`."""
