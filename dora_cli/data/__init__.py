"""Gives batches: rows from files or the hub, tasks that turn rows into tokens, batches of similar length."""
