"""Training of our decoders: batches, losses, modes, guidance by a source's features, checkpoints."""
