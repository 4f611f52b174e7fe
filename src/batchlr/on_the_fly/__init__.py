"""The parts of learning a rate while training, which ``batchlr.controller`` puts together."""
