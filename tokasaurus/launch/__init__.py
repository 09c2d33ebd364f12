"""The composition root: turns choices into slices, and runs the rooms in processes or in one."""
