"""The published layouts that core knows, a module per family."""
