"""What `ltxkern.patch` is made of: which modules are sites, what takes their place, and the report about it."""
