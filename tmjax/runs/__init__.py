"""Run directories: the manifest, and stages that are skipped when their output is intact."""
