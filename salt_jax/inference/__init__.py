"""What a trained model is used for: decoding, generation, scoring, soft labels."""
