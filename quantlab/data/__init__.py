"""Bundled data: the Korean Text2SQL domains, their databases and questions, and their generators."""
