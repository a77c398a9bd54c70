"""Drafts in MLflow: every version with its lineage, its curve and its bytes' digest. Plain artifacts, never a pickle."""
