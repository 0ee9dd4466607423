"""Makes files appear whole, and reads them with suspicion."""
