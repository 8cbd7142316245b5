"""The command line: flags, gin settings and what is said of mistakes in them."""
