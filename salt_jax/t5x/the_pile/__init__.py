"""The Pile as a TFDS dataset: `tfds build` in this folder makes it."""
