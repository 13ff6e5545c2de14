"""The stages of the pipeline that need no other package."""
