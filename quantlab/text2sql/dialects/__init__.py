"""MySQL's and PostgreSQL's functions, operators and dates, each as a SQLite expression of the same value.

`transpile.py` is the way in. What a module here does not know it refuses (`nodes.Untranslatable`), it never guesses.
"""
