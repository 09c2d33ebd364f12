"""Runs the manager against a simulated device, to predict and explain. Needs no GPU and no torch.

A :class:`~tokasaurus.planner.simulated_device.SimulatedDevice` takes batches like a worker and says
how long they would take. ``worker_loop`` runs it in a worker's place in real time. ``replay`` runs
it and a manager in virtual time, with the requests of a ``trace``.
"""
