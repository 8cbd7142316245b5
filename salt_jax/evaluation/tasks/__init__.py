"""Tasks of salt_suite that lm-eval hasn't, in its own YAML, and what they compute."""
