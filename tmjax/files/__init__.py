"""Files on disk: atomic writes, locks, ownership, paths, JSON."""
