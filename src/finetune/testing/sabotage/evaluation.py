"""What goes wrong in evaluating."""
