"""Training draft heads from the dialogues that a model writes itself."""
