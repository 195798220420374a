"""From a model to its Fisher: likelihoods, layers, the uses of their parameters, and the capture."""
