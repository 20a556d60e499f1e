"""How answers are told right from wrong."""
