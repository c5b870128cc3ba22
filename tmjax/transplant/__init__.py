"""Vocabulary transplant: another tokenizer for a model, or more tokens, and the rows of the tokens that are new."""
