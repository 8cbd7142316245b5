"""What a running process relies on: the other processes, its output streams, signals."""
