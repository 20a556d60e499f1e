"""One training: its job, what it needs, what becomes of a step that fails, how it goes on."""
