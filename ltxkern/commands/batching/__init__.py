"""What `ltxkern batch` is made of: the items of its file, and their spread over machines."""
