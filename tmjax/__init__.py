"""tmjax: merge large language models of different architectures by optimal transport, in JAX."""

__version__ = "0.1.0"
