"""What goes wrong in serving."""
