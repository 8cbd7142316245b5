"""SALT's data and model for SeqIO and T5X; only this folder and tasks/ import TensorFlow."""
