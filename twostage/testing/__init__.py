"""Virtual time and a simulated API, for tests of your own scripts."""

from twostage.testing.virtual import ApiError, Latency, SimulatedApi, VirtualTime, sleep

__all__ = ["ApiError", "Latency", "SimulatedApi", "VirtualTime", "sleep"]
