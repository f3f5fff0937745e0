"""Several ranks on one generation."""
