"""Virtual time and a simulated API, for tests of your own scripts."""

from twostage.testing.simulated import ApiError, Latency, SimulatedApi
from twostage.testing.virtual import VirtualTime, sleep

__all__ = ["ApiError", "Latency", "SimulatedApi", "VirtualTime", "sleep"]
