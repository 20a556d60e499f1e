"""Data: reading rows, telling what they hold, rendering them as conversations, masking, and checking the result."""
