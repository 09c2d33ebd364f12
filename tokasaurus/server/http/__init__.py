"""What HTTP needs: errors as answers, bodies, uploads, keys, request ids, routes past the framework."""
