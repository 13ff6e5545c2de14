"""GaussianToken: images as quantized 2-D Gaussians."""
