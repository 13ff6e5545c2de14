"""Generators of discrete image tokens, and the transformer, caches and samplers that they share."""
