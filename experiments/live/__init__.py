"""The sockets on which browsers watch runs."""
