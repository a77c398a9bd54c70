"""Acceptance statistics over the lake (DuckDB) and the verdict on drift. The only stage that speaks SQL."""
