"""Pages made of the studies: the playground on a network of one's own, and HTML files that need no Python."""

from .explore import Explorer, explore
from .playground import save_moving, save_page
from .race import save_race

__all__ = ["Explorer", "explore", "save_moving", "save_page", "save_race"]
