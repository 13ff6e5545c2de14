"""Images from files, and tokens in files."""
