"""What decoder architectures are put together from. ``rope_config`` loads no torch."""
