"""What goes wrong in saving and resuming."""
