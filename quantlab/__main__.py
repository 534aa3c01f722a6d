"""`python -m quantlab` is the same as `quantlab`."""

from quantlab.cli import main

if __name__ == "__main__":
    main()
