"""How gradients differ from sample to sample and from batch to batch."""
