"""The training programs: configuration, data, models, checkpoints and the loop."""
