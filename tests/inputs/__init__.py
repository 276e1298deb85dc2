"""Inputs drawn at random, and what must hold for each: for tests, and for scripts/fuzz_inputs.py."""
