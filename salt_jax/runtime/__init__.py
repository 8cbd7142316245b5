"""The process itself: other processes of the run, output streams, signals."""
