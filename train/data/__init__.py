"""Training data: prompts, preference datasets, latent shards, prompt embeddings."""
