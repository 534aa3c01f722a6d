"""Opening models: the files on disk, decoder blocks one at a time, the whole model for evaluation, and the
model that ships with quantlab (``embedded:base``)."""
