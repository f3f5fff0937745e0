"""`ltxkern serve`: videos over HTTP from one warm pipeline, with a queue that outlives kills."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ltxkern.commands import admission, options

EXTRA = ("fastapi", "uvicorn", "starlette", "pydantic", "h11", "python_multipart")


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "serve",
        help="make videos over HTTP",
        description="Serve one model over HTTP, with a page to ask for videos and see them. Jobs wait in a queue on disk, and go "
        "on from their last step after any end of the server or its worker.",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="any other than this machine's own needs a token (default 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=8188, help="0 takes a free one (default 8188)")
    parser.add_argument("--data", metavar="DIR", help="queue and results (default: `service` in the user's cache)")
    parser.add_argument(
        "--token-file", metavar="FILE", help="has the bearer token (default: that of LTXKERN_SERVE_TOKEN, if set)"
    )
    parser.add_argument("--queue", type=int, default=100, metavar="N", help="videos that may wait (default 100)")
    parser.add_argument(
        "--keep", type=int, default=200, metavar="N", help="videos that stay once they are done (default 200)"
    )
    parser.add_argument("--max-upload-mib", type=int, default=64, metavar="N", help="of a request (default 64)")
    options.add_model_options(parser)
    parser.add_argument("--config", metavar="FILE.yaml", help="options from a file; the command line wins")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Check everything, then serve until told to stop."""
    for name, least, most in (
        ("port", 0, 65535),
        ("queue", 1, 10**6),
        ("keep", 1, 10**6),
        ("max_upload_mib", 1, 2**14),
    ):
        value = getattr(arguments, name)
        if not least <= value <= most:
            raise ValueError(
                f"{name.replace('_', '-')} must be between {least} and {most}, got {value}: use {min(max(value, least), most)}"
            )
    try:
        from ltxkern.service.fields import Offer
        from ltxkern.service.jobs import Settings
        from ltxkern.service.server import find_token, serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in EXTRA:
            raise
        raise ValueError(f'{error.name} is not installed: pip install "ltxkern[serve]"') from error
    from ltxkern.whole_files import cache_folder

    token = find_token(arguments.host, arguments.token_file)
    chosen = admission.read_model_options(arguments)
    folder = cache_folder() / "service" if arguments.data is None else Path(os.path.abspath(arguments.data))
    settings = Settings(folder, token, arguments.queue, arguments.keep, arguments.max_upload_mib << 20)
    offer = Offer(chosen, chosen.sizes)
    serve(settings, offer, arguments.host, arguments.port, lambda url: print(f"listening on {url}", flush=True))
    return 0
