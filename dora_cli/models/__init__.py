"""Gives a base model, its tokenizer, its head and the names of its target modules."""
