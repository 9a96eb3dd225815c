"""`python -m lightning_modules.cli`, where the command is not installed."""

from lightning_modules.cli import main

if __name__ == "__main__":  # and not a process that one of its workers is started in
    main()
