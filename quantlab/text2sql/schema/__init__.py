"""CREATE TABLE statements read into a schema, and names looked up in it."""
