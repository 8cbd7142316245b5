"""Plans of runs: memory, traffic and time of programs compiled for devices that aren't there."""
