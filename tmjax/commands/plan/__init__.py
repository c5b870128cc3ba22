"""`tmjax plan`."""
