"""Makes the bundled Korean Text2SQL data and the embedded model."""
