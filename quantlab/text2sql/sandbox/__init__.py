"""Runs SQL that nobody trusts: processes that can read one database file and nothing else."""
