"""`ltxkern serve`: a queue on disk, a worker process with one warm pipeline, and HTTP in front of both."""
