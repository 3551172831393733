"""A hardware profile from what a user gives. hwprofiles imports nothing of ours, so its errors become ours here."""

from __future__ import annotations

from compress import hwprofiles
from compress.errors import UsageError
from compress.hwprofiles import Profile


def as_profile(profile: str | Profile | None, target: str | None = None) -> Profile:
    """A profile from an id, a file, or this machine's (None), for its own export target or another.

    Raises: UsageError for what is no profile.
    """
    found = profile if isinstance(profile, Profile) else _read(profile)
    return found if target is None else found.model_copy(update={"target": target})


def _read(profile: str | None) -> Profile:
    try:
        return hwprofiles.detect() if profile is None else hwprofiles.load(profile)
    except hwprofiles.ProfileError as error:
        raise UsageError(str(error)) from error
