"""Teacher data: probabilities of the target's tokens, generated texts and features of a source."""
