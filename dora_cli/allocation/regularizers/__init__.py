"""One file per answer; see the tables in ``dora_cli/allocation/__init__.py``."""
