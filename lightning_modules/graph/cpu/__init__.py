"""The image operator on a CPU, in C."""
