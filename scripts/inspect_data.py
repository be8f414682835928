"""Say what a captioned folder holds and what is wrong with it; exit 0 usable, 1 not usable."""

import argparse
import json
import sys

from latentdiff.config.io import parse_arguments
from latentdiff.config.text_to_image import Config
from latentdiff.terminal import quieten_libraries


def main() -> int:
    """Exit 0 usable, 1 not usable, 2 bad usage or input."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="and all options of training")
    parser.add_argument("root", metavar="FOLDER")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--html", help="also write the report to this file")
    parser.add_argument("--full", action="store_true", help="decode every image, known or not")
    parser.add_argument("--quick", action="store_true", help="do not look for alike images")
    parser.add_argument("--tokenizer", default="", help="folder of the tokenizer to count with")
    parser.add_argument("--vae", default="", help="folder of the VAE whose speed is measured")
    args, others = parser.parse_known_args()
    quieten_libraries()
    from latentdiff.data.folder.folder import read_folder
    from latentdiff.data.inspection.html_report import write_report_html
    from latentdiff.data.inspection.inspect import chosen, inspect_folder, progress_bar
    from latentdiff.data.inspection.text_report import report_as_text

    try:
        config = parse_arguments(Config, others, exit_on_error=False)
        settings = {**vars(config.train), **vars(config.data), **vars(args)}
        folder = read_folder(**chosen(settings, read_folder), progress=progress_bar())
        report = inspect_folder(folder, **chosen(settings, inspect_folder), progress=progress_bar())
        if args.html:
            write_report_html(report, folder, path=args.html)
    except (ValueError, OSError) as error:
        print(f"inspect_data.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.to_json(), indent=2) if args.json else report_as_text(report))
    return 0 if report.is_usable else 1


if __name__ == "__main__":
    sys.exit(main())
