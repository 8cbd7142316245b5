"""Packed rows, vocabularies, scores and the input pipeline; no TensorFlow."""
