"""Transfer operators: from an alignment and a source to new target parameters, and the table of changes."""
