"""The one decoder, its spec, and the tables of every family."""
