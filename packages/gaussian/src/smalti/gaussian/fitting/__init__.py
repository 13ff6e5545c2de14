"""Fitting one picture with 2-D Gaussians: `smalti fit`."""
