"""What may be configured, and the refusal of everything else."""
