"""Windows of captured states in, a better draft out. Never loads the target network: only its embeddings and lm_head."""
