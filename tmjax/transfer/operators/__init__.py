"""Transfer operators, one per file."""
