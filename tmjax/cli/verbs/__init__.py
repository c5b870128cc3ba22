"""One file per command: its flags, and how its result is shown."""
