"""Training of our decoders: documents into batches, the causal-LM loss, one jitted AdamW step."""
