"""Words that several tasks draw from."""

from __future__ import annotations


def words(text: str, separator: str = " ") -> tuple[str, ...]:
    """The parts of a text; a compact way to write a list of words."""
    return tuple(text.split(separator))


CITIES = words("Paris London Rome Berlin Madrid Oslo Vienna Dublin Lisbon Athens Prague Cairo")
NAMES = words("Anna Tom Maria Jack Emma Paul Lucy Ben Sara Mark Julia Peter Nina Oscar Rosa Hugo")
ITEMS = words("lamp chair table book phone bottle jacket camera bike clock mirror pillow")
