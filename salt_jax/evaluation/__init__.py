"""What a model says, held against what it should say: a model in, metrics out."""
