"""Recipe: what is wanted. Frozen, typed, loaded from YAML; every fault is reported at once, with its place."""

from finetune.recipe.load import dump, load, load_mapping
from finetune.recipe.model import Recipe

__all__ = ["Recipe", "dump", "load", "load_mapping"]
