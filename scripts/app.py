"""Serve a page to draw on: python scripts/app.py MODEL, then open http://127.0.0.1:7860."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser

from latentdiff.config.sampling import PageOptions
from latentdiff.terminal import quieten_libraries


def main() -> int:
    """Parse and serve; exit 0 when interrupted, 2 for bad usage or input."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", type=str, help="a Stable-Diffusion-format folder or a hub id")
    parser.add_class_arguments(PageOptions)
    given = parser.parse_args().as_dict()
    quieten_libraries()
    from latentdiff.app.web_ui import serve

    try:
        serve(given.pop("model"), PageOptions(**given))
    except ImportError as error:
        print(f'app.py: {error}; pip install "latentdiff[ui]"', file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
