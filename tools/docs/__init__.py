"""Makes the parts of the documentation that come from the code: the reference pages and the plot."""
