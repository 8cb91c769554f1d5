"""Programs that are compiled before they are needed."""

import dataclasses
from typing import Any

from jaxformers.generation.generate import decode
from jaxformers.generation.prompts import Prompt, put
from jaxformers.generation.request import read_request
from jaxformers.ids import Tokens


def compile_generate(
    model: Any,
    prompt: Tokens | Prompt,
    max_new_tokens: int,
    options: dict[str, Any],
    source: Prompt | None = None,
) -> None:
    """Compiles the program of such a call of `generate`, and runs it for one new token.

    Arguments as for `generate.generate`.
    """
    request = read_request(model, prompt, max_new_tokens, options, source=source)
    plan = dataclasses.replace(request.plan, limit=put(request.start + 1))
    decode(model, request._replace(plan=plan), options)
