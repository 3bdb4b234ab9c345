"""``python -m hf_noneuclid`` is the command ``noneuclid``."""

from .cli import main

if __name__ == "__main__":
    main()
