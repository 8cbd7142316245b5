"""Tasks of salt_suite that lm-eval doesn't have, in its YAML format, and their metrics."""
