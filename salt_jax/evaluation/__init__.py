"""Few-shot tasks through lm-evaluation-harness: a model in, metrics out."""
