"""The command `jaxformers serve PATH`."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from jaxformers.cli.text_model import add_model_options, load_as

EXAMPLES = """examples:
  jaxformers serve HuggingFaceTB/SmolLM2-135M-Instruct
  jaxformers serve HuggingFaceTB/SmolLM2-135M-Instruct --port 0 --rows 4 \
--embedder sentence-transformers/all-MiniLM-L6-v2
  JAXFORMERS_KEY=secret jaxformers serve sentence-transformers/all-MiniLM-L6-v2 --host 0.0.0.0
"""
KEY = "JAXFORMERS_KEY"
CONTEXT = "the most tokens of a prompt with its answer (default: the model's, up to 4096)"
SIZES = "rows", "context", "waiting"  # of the engine, which has defaults for them


def add_serve(commands: argparse._SubParsersAction) -> None:
    """Adds the command `serve PATH`."""
    parser = commands.add_parser(
        "serve",
        help="answer the clients of OpenAI's interface",
        description="Serve a model to clients of OpenAI's interface: chats, completions and "
        "embeddings. Ctrl-C or SIGTERM lets running answers end; a second one ends at once.",
        epilog=EXAMPLES,
    )
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help="default: 127.0.0.1")
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: 8000)"
    )
    parser.add_argument(
        "--rows", type=int, metavar="N", help="answers at the same time (default: 8)"
    )
    parser.add_argument("--context", type=int, metavar="N", help=CONTEXT)
    parser.add_argument(
        "--waiting", type=int, metavar="N", help="answers that may wait (default: 64)"
    )
    parser.add_argument(
        "--warm-up",
        type=int,
        metavar="N",
        help="compile for rows of up to N tokens at the start (default: 512)",
    )
    parser.add_argument(
        "--key", metavar="KEY", help=f"what clients have to send (default: the variable {KEY})"
    )
    parser.add_argument("--name", metavar="NAME", help="the name of the model for clients")
    parser.add_argument("--embedder", metavar="PATH", help="a checkpoint for embeddings")
    parser.add_argument("--embedder-name", metavar="NAME", help="its name for clients")
    parser.set_defaults(run=run_serve)


def run_serve(options: argparse.Namespace) -> int:
    check_packages()
    from jaxformers.serving.app import App
    from jaxformers.serving.server import bind, serve, url_of

    key = os.environ.get(KEY) if options.key is None else options.key
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"--key or {KEY} must be characters of ASCII without spaces.")
    if options.embedder is None and options.embedder_name is not None:
        raise ValueError("--embedder-name names an --embedder, got none. Pass --name for PATH.")
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port must be from 0 to 65535, got {options.port}.")
    with bind(options.host, options.port) as sock:  # before the model is read, which takes longer
        app = App(*load_models(options), key)

        def ready() -> None:
            print(f"serving {', '.join(app.names)} at {url_of(sock)}", flush=True)

        serve(app, sock, ready)
    return 0


def check_packages() -> None:
    """Raises `ImportError` with the line that installs what is missing."""
    try:
        import starlette
        import uvicorn

        del starlette, uvicorn
    except ImportError as error:
        raise ImportError(
            "serve needs the packages starlette and uvicorn: pip install 'jaxformers[serve]'"
        ) from error


def default_name(path: str) -> str:
    """Returns the name of a checkpoint for clients: of files their own name, else that of the hub.

    Example:
        >>> default_name("HuggingFaceTB/SmolLM2-135M"), default_name("/")
        ('HuggingFaceTB/SmolLM2-135M', 'model')
    """
    found = Path(path).expanduser()
    if not found.exists():
        return path
    return os.path.basename(os.path.abspath(found)).removesuffix(".gguf") or "model"


def load_models(options: argparse.Namespace) -> tuple[Any, Any]:
    """Returns the `Generator` and the `Embedder` that the options name, one of which may be None.

    The engine of the generator has begun.
    """
    from jaxformers.serving.embeddings import Embedder
    from jaxformers.serving.engine import Engine
    from jaxformers.serving.generator import Generator
    from jaxformers.text.embedder import TextEmbedder

    found = load_as(GeneratorOrEmbedder, options)
    name = options.name or default_name(options.path)
    if isinstance(found, TextEmbedder):
        for option in ("embedder", *SIZES, "warm_up"):
            if getattr(options, option) is not None:
                raise ValueError(
                    f"--{option.replace('_', '-')} is for a PATH that generates text, got "
                    f"{options.path}, which gives embeddings alone. Leave it out."
                )
        return None, Embedder(name, found)
    embedder = None
    if options.embedder is not None:
        other = options.embedder_name or default_name(options.embedder)
        if other == name:
            raise ValueError(
                f"both models would have the name {name}. Pass --name or --embedder-name."
            )
        embedder = Embedder(other, TextEmbedder.from_pretrained(options.embedder))
    sizes = {x: getattr(options, x) for x in SIZES if getattr(options, x) is not None}
    engine = Engine(found.model, **sizes)
    generator = Generator(name, found, engine, engine.waiting)
    if sys.stderr.isatty():  # someone waits for it
        print("compiling, which takes longer for the first time", file=sys.stderr, flush=True)
    engine.warm_up(*([] if options.warm_up is None else [options.warm_up]))
    engine.start()
    return generator, embedder


class GeneratorOrEmbedder:
    """What a checkpoint is read as: a `TextGenerator` if it generates, else a `TextEmbedder`."""

    @classmethod
    def from_pretrained(cls, path: str, dtype: Any = None) -> Any:
        """Returns a checkpoint with its tokenizer."""
        from jaxformers.pretrained import from_pretrained
        from jaxformers.text.directory import find_directory, tokenizer_beside
        from jaxformers.text.embedder import TextEmbedder
        from jaxformers.text.generator import TextGenerator
        from jaxformers.text.sentence_transformers import MODULES
        from jaxformers.transformer_encoder import TransformerEncoder

        is_file = Path(path).expanduser().is_file()
        if not is_file and (find_directory(path) / MODULES).exists():
            return TextEmbedder.from_pretrained(path, dtype=dtype)
        model: Any = from_pretrained(path, dtype=dtype)
        if isinstance(model, TransformerEncoder):
            return TextEmbedder.from_pretrained(path, dtype=dtype)
        return TextGenerator(model, tokenizer_beside(model, path))
