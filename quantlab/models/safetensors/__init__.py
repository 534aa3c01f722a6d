"""Weights on disk: which files a model consists of, safe readers, writes that survive a kill."""
