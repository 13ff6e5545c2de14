"""Multi-scale deformable attention: the operator, its forms, and the layer."""
