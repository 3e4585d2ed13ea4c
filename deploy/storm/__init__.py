"""A storm of cancellations, disconnects and malformed requests against a real cluster: see `command`."""
