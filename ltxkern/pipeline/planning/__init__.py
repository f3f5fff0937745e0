"""What a request needs, in memory and time, before anything is loaded."""
