"""Witness databases: rows on which a gold query and its mutants give different results."""
