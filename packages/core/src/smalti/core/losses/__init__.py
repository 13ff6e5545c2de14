"""Losses of tokenizer training beyond those of the quantizer."""
