"""Results for people: the ranked table, the HTML page, the model card of a checkpoint."""
