"""Hidden-state dumps of other systems become windows of the lake. docs/signals.md, "Bringing your own", says which and how sure we are."""
