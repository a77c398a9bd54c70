"""Dagster: assets name data, sensors decide when, jobs say what runs. A thin skin: every stage also runs by hand with `tide`."""
