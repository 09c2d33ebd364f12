"""Several workers that run one model together."""
