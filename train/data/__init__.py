"""What a run learns from: prompts, preference datasets, latent shards, text embeddings."""
