"""Discriminators: images to logits, real or reconstructed."""
