"""Distillation: what a student learns from, how it is trained, and sweeps over it."""
