"""The published layouts of generators' weights."""
