"""How fast the transforms are, beside what they replace: ``python -m benchmarks --help`` from a clone."""
