"""Where KV lies: pages and who holds them, the prefix cache, which sequences share pages."""
