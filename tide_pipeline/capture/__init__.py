"""StepEvents to Parquet and back. Two datasets, acceptance and signals; docs/signals.md is their reference."""
