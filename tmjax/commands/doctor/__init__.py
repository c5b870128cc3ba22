"""`tmjax doctor`."""
