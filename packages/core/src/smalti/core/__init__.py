"""smalti.core: what every part of smalti agrees on, and the pipeline that joins the parts.

Importing this package costs nothing: torch is imported by the modules that compute.
"""
