"""One method a file: tensors and plain arguments in, codes, scales and zeros out."""
