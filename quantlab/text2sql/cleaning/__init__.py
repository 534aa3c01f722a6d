"""Which rows of a training set stay: syntax, names, execution, the judge, duplicates."""
