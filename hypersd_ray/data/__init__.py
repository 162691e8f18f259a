"""Image-text shards -> latents and embeddings -> batches, through Ray Data."""
