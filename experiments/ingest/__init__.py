"""The socket on which supervisors and recorders send telemetry."""
