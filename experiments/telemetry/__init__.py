"""The telemetry store: writing, roll-ups, reading at any zoom, export."""
