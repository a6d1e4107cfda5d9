"""`python -m alpenglow`, for launchers that start modules: torchrun -m alpenglow distill ..."""

from alpenglow.cli import main

if __name__ == "__main__":
    main()
