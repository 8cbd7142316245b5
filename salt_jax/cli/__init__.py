"""The command line: flags, gin settings and the error messages about them."""
