"""`tmjax merge`, `align` and `fuse`."""
