"""What a run says to people: tables, plots, one HTML page, a model card."""
