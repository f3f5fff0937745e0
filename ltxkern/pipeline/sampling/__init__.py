"""What happens between two model calls: schedules, samplers, guidance, latent state."""
