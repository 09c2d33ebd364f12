"""The routes: of the operations, of files and batches, and of the engine itself."""
