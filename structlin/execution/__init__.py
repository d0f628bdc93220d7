"""Ways to run a chain of einsums."""
