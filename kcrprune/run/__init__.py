"""A run: a literal table of stages, and the folder that keeps what they give."""
