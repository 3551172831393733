"""A hardware profile from what a user gives. hwprofiles imports nothing of ours, so its errors become ours here."""

from __future__ import annotations

from compress import hwprofiles
from compress.errors import UsageError
from compress.hwprofiles import Profile


def as_profile(profile: str | Profile | None) -> Profile:
    """A profile from an id, a file, or this machine's (None). Raises: UsageError for what is no profile."""
    if isinstance(profile, Profile):
        return profile
    try:
        return hwprofiles.detect() if profile is None else hwprofiles.load(profile)
    except hwprofiles.ProfileError as error:
        raise UsageError(str(error)) from error
