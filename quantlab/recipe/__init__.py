"""Recipes: one YAML file each, validated before anything heavy is imported."""
