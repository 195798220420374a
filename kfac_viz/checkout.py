"""What stands beside the package in a source checkout only: notebooks, and figures with their measured tables."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent


def check_checkout(what: str, root: Path = ROOT) -> None:
    """ValueError where the package was installed without its checkout, and ``what`` is therefore missing."""
    if not (root / "notebooks").is_dir():
        raise ValueError(
            f"{what} are in the source checkout only, and this copy of kfac_viz, in {PACKAGE}, was installed without "
            "it. Run Python in the folder of the checkout, or install from there with: pip install -e ."
        )
