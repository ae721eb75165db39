"""Names the packages that a command cannot import, and how to install them."""

from __future__ import annotations

from importlib import import_module

from ringattn.errors import LaunchError

INSTALL = {"tyro": "'ringattn[cli]'", "rich": "'ringattn[cli]'", "torch": "torch"}


def require(*packages: str) -> None:
    """Raise `LaunchError` where some of `packages` cannot be imported."""
    reasons = {}
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            reasons[package] = str(error)
    if reasons:
        names, arguments = " and ".join(reasons), " ".join(dict.fromkeys(INSTALL[name] for name in reasons))
        raise LaunchError(f"{names} cannot be imported ({'; '.join(reasons.values())}); install with `pip install {arguments}`")
