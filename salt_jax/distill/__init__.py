"""The pure mathematics of SALT: losses, schedules, scores, selection. Arrays in, arrays out."""
