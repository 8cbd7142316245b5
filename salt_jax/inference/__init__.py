"""Uses of a trained model: decoding, generation, scoring, soft labels."""
