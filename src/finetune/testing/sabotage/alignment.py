"""What goes wrong in preference alignment."""
