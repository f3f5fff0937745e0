"""`ltxkern verify`: every op and backend on its hard cases, in subprocesses, then timed; and the probe at first use."""
