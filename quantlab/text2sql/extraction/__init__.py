"""The SQL in what a model wrote: candidate statements, the first complete one."""
