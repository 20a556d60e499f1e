"""What becomes of a finished run."""
