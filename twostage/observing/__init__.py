"""What happens in a job, for who wants to hear of it: `Observer`, and the events it is told."""

from twostage.observing.events import (
    Attempt,
    HeldBack,
    JobBegan,
    JobEnded,
    Observer,
    Progress,
    RetryDue,
    StageSettings,
)

__all__ = ["Attempt", "HeldBack", "JobBegan", "JobEnded", "Observer", "Progress", "RetryDue", "StageSettings"]
