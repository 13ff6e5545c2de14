"""An example of a third-party tokenizer for smalti."""
