"""Process-level runtime: multi-process setup, output streams, signals."""
