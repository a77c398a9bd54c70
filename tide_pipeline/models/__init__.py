"""The networks: a Hugging Face target with taps and KV cache, and the EAGLE-3 draft. Knows no requests."""
