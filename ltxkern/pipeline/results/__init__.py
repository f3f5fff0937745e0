"""What a generation leaves on disk."""
