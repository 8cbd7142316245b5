"""What a run will need, before it runs: programs compiled for slices that one doesn't have."""
