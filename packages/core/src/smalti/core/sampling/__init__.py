"""Drawing samples with a trained generator: runs that can be interrupted, their memory, and traces of them."""
