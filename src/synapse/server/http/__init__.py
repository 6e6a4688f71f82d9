"""What every route needs: connections, limits, errors, permission, and the log of requests."""
