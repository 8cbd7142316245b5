"""SALT's losses, schedules, scores and selection rules: pure functions of arrays."""
