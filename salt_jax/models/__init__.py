"""The decoder: arrays of token ids in, hidden states and a head out."""
