"""The decoder: from token ids to hidden states and a head."""
