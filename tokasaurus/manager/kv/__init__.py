"""Where KV lies: pages and their holders, the prefix cache, which sequences share pages."""
