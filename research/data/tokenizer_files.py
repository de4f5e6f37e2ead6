"""The vocabulary of a run as a file beside it, so that text can be read and written without the corpus."""

import json
import os
import pathlib
from typing import Literal, overload

from research.data.tokenizers import Tokenizer, tokenizer_from_json
from research.errors import UserError
from research.files import printable, read_json, write_text

FILE = "tokenizer.json"


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
    """Writes `tokenizer.json`, whole or not at all."""
    write_text(pathlib.Path(folder) / FILE, text_of(tokenizer))


def text_of(tokenizer: Tokenizer) -> str:
    """What the file holds."""
    return json.dumps(tokenizer.to_json(), ensure_ascii=False) + "\n"


@overload
def load_tokenizer(folder: str | os.PathLike[str], *, required: Literal[True] = True) -> Tokenizer: ...
@overload
def load_tokenizer(folder: str | os.PathLike[str], *, required: bool) -> Tokenizer | None: ...
def load_tokenizer(folder: str | os.PathLike[str], *, required: bool = True) -> Tokenizer | None:
    """Returns the tokenizer that `save_tokenizer` wrote; None where there is none and none is required.

    Raises:
      UserError: no such file though it is required, or a damaged one.
    """
    path = pathlib.Path(folder) / FILE
    if not os.path.lexists(path):
        if required:
            raise UserError(
                f"{folder} holds no {FILE}, so text cannot become tokens; give tokens as numbers (--prompt_ids=1,2,3)"
            )
        return None
    data = read_json(path, ("kind",))
    try:
        return tokenizer_from_json(data)
    except UserError as error:
        raise UserError(f"{path} is damaged: {printable(error, 200)}") from None
