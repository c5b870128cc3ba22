"""`tmjax adapt`."""
