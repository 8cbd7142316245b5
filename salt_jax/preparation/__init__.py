"""From text to a packed cache. The only part, with tasks/, that imports TensorFlow and SeqIO."""
