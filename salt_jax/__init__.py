"""SALT, small-model aided large-model training (arXiv 2410.18779), in JAX.

Names of arrays end in their shape, one letter a dimension:

    B batch   L length   D model width   V vocabulary   H heads   G key-value heads
    K head width   F hidden width   N rows   M microbatches
"""

__version__ = "0.2.0.dev0"
