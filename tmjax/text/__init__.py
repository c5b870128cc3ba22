"""Texts and tokenizers: documents, vocabularies as bytes, spans paired between two tokenizers."""
