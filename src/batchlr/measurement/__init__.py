"""The parts of one measurement of curvature, which ``batchlr.curvature`` puts together."""
