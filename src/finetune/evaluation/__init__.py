"""How answers are told right from wrong."""

REREAD = 24  # answers a phase that are read again token by token
