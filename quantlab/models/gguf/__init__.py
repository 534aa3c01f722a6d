"""Models in GGUF files: configuration, tokenizer and weights as the rest knows them from safetensors."""
