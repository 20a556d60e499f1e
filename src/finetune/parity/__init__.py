"""Does an export behave like the model it came from? Each is observed in a process of its own, then held against the
model before it: prompts, distributions, greedy answers, endings, what was learned."""
