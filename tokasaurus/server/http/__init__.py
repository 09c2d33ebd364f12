"""What HTTP needs: bodies, answers, event streams, keys, request ids, and routes past FastAPI."""
