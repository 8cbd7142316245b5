"""Everything that runs a model over a mesh: training, scoring, evaluation, checkpoints."""
