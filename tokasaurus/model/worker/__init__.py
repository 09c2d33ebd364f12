"""The worker runs numbered batches, and keeps the tables of slots that they change."""
