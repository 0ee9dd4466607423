"""dora_cli: fine-tune transformers under a parameter budget, from the command line."""

__version__ = "0.1.0"
