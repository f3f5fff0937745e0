"""One generation, from request to latents."""
