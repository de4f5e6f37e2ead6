"""The vocabulary of a run as a file beside it, so that text can be read and written without the corpus."""

import json
import os
import pathlib
import shutil

from research.data.tokenizers import Tokenizer, tokenizer_from_json
from research.errors import UserError

FILE = "tokenizer.json"


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
    """Writes `tokenizer.json`, whole or not at all."""
    path = pathlib.Path(folder) / FILE
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(tokenizer.to_json(), ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def load_tokenizer(folder: str | os.PathLike, *, required: bool = True) -> Tokenizer | None:
    """Returns the tokenizer that `save_tokenizer` wrote; None where there is none and none is required.

    Raises:
      UserError: no such file though it is required, or a damaged one.
    """
    path = pathlib.Path(folder) / FILE
    if not path.is_file():
        if required:
            raise UserError(f"{folder} holds no {FILE}, so text cannot become tokens; give tokens as numbers (--prompt_ids=1,2,3)")
        return None
    try:
        return tokenizer_from_json(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def copy_tokenizer(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies the tokenizer of one folder to another, where there is one."""
    path = pathlib.Path(source) / FILE
    if path.is_file():
        shutil.copyfile(path, pathlib.Path(target) / FILE)
