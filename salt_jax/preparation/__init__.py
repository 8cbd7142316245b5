"""From text to a packed cache. The only part, with tasks/, that imports TensorFlow and SeqIO."""

import os

# TensorFlow announces its build and every missing GPU library on standard error; none of it
# concerns reading text.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
