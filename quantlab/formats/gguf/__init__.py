"""GGUF, the file that llama.cpp and what is built on it read: block types, encoders, the writer."""
