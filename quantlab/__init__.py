"""quantlab: make language models small, and prove what that cost."""

__version__ = "0.1.0"
