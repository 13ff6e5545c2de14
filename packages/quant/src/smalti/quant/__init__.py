"""Quantizers of image latents behind one contract.

Import what you need from its module: `smalti.quant.vector`, `smalti.quant.lookup`.
"""
