"""The manager against a simulated device: predict, search, explain. Needs no GPU, and no torch.

A :class:`~tokasaurus.planner.simulated_device.SimulatedDevice` takes batches as a worker does and says
how long they would take; ``worker_loop`` puts it behind a worker's door in real time, ``replay`` drives
it and a manager in virtual time, with requests from a ``trace``.
"""
