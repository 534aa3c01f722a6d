"""Data to score on: items, benchmarks as their authors publish them, predictions made elsewhere."""
