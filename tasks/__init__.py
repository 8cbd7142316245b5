"""SeqIO tasks: importing a module of this package registers its tasks and reads no data."""
