"""A finished checkpoint reopened in a fresh process, its logits held against the intended ones."""
