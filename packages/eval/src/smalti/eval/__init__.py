"""smalti.eval."""
