"""The parts that decoder architectures share."""
