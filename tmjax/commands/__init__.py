"""The commands: stages of a run, each with its input hash."""
