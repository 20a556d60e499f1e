"""What goes wrong in merging and exporting."""
