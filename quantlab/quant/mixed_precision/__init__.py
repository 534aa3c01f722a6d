"""`bits: auto`: how sensitive each layer is, and the widths that fit a target."""
