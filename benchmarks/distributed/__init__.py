"""Several processes: how training scales over them, and what they send one another."""
