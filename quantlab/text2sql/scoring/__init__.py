"""Is an answer right: both queries run, results compared, ties of ORDER BY, exact match."""
