"""Drawing 2-D Gaussians: the operator, its plain definition, and its backends."""
