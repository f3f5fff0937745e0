"""Model files: where they lie, what they hold, how they are read."""
