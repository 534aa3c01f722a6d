"""The rules of published evaluators, rewritten, to stand beside execution accuracy."""
