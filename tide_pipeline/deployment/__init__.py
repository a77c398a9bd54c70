"""What is served: the append-only deployment record and engine builds on disk. Read by replicas, written by rollout."""
