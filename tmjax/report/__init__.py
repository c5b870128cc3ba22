"""Reports of runs: tables, plots, one HTML page, a model card."""
