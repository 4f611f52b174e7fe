"""Learning rates and momentum measured from the batch Hessian."""
