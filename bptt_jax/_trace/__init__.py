"""The call of a scan as a value: its flat step, its axes of time, and a gradient of it."""
