"""Specs: a recipe, the options to run it with, and the bounds that its result is held to; one YAML file a test."""
