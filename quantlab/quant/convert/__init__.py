"""A quantized checkpoint in another layout: the same codes and scales, nothing is quantized again."""
