"""One file per verb of the `salt` command: settings in, files out; wiring only."""
