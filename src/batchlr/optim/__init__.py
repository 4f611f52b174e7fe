"""Optimizers published with the batch-size methods here, as torch optimizers."""
