"""Files: checkpoints, tokenizers, texts, atomic writes. No model code."""
