"""What a model is shown: the prompt, its examples, the tables that a question needs."""
