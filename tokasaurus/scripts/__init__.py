"""Small commands beside the engine: clients of its API, and the download of models."""
