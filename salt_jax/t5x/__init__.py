"""SALT's data and model for SeqIO and T5X: the only part that imports TensorFlow."""
