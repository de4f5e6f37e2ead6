"""Docstrings and the code that they describe, of Python's own standard library: real pairs that every machine has.

A pair is the docstring of a function and its body without the docstring; neither the function's name nor its signature
is in it. The module decides the domain. As in `stdlib_text`, figures move a little with the version of Python.
"""

import ast
import re
import textwrap
from collections.abc import Iterator

from research.data.kinds import PAIRS
from research.data.registry import register
from research.data.splits import SPLITS, path_split
from research.data.stdlib_text import read_files
from research.data.text_pairs import Pair, PairSource, pair_sources, words
from research.errors import UserError

_SPLIT = (0.75, 0.1)
_FEWEST_WORDS = 4
_LINE_END = re.compile(r"\r\n|\r|\n")

DOMAINS: dict[str, str] = {
    "interface": "tkinter idlelib turtle turtledemo curses cmd code rlcompleter",
    "internet": "email http urllib mailbox imaplib smtplib smtpd ftplib poplib nntplib telnetlib xmlrpc wsgiref "
    "socketserver ssl socket asyncore asynchat cgi cgitb ipaddress webbrowser html mimetypes mailcap netrc uuid base64 "
    "quopri",
    "system": "asyncio multiprocessing concurrent threading subprocess queue selectors sched signal os shutil tempfile "
    "logging pathlib ntpath posixpath genericpath platform glob fnmatch stat pty tty getpass sysconfig site venv "
    "ensurepip _pyio io ctypes contextvars filecmp fileinput",
    "data": "_pydecimal decimal statistics random fractions numbers datetime _pydatetime calendar _strptime zoneinfo "
    "json xml csv configparser codecs encodings tarfile zipfile gzip bz2 lzma zlib pickle plistlib shelve dbm "
    "collections _collections_abc heapq bisect array struct string textwrap difflib colorsys hashlib hmac secrets copy "
    "sqlite3 graphlib wave aifc sunau chunk tomllib",
    "language": "ast inspect typing importlib lib2to3 distutils unittest pydoc doctest pdb bdb dis symtable enum "
    "functools types abc operator contextlib dataclasses traceback trace tracemalloc warnings weakref argparse "
    "optparse pickletools pkgutil zipimport imp tokenize token keyword linecache opcode py_compile compileall profile "
    "cProfile pstats timeit tabnanny pyclbr modulefinder runpy re copyreg reprlib pprint shlex _weakrefset _py_abc "
    "codeop locale gettext",
}
"""Domain -> its modules and packages; those in none are left out."""


@register("stdlib_pairs", PAIRS)
def load_stdlib_pairs(*, length: int = 64, vocab_size: int = 8192) -> dict[str, PairSource]:
    """(docstring, body) of the functions of the standard library, of five domains.

    A hash of the file and the outermost class or function around it decides the split of a function, about 75 %, 10 %
    and 15 %: the methods of a class stay together. Docstrings that occur again and texts of fewer than four words are
    left out.

    Args:
      length: tokens of a text; longer ones are cut.
      vocab_size: number of tokens, the place of the domain's included.

    Raises:
      UserError: this Python has no such files.
    """
    owner = {module: domain for domain, modules in enumerate(DOMAINS.values()) for module in modules.split()}
    pairs: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    seen = set()
    for path, data in read_files().items():
        domain = owner.get(path.split("/")[0].removesuffix(".py"))
        if domain is None:
            continue
        for root, doc, body in functions(data):
            if doc in seen or min(len(words(doc)), len(words(body))) < _FEWEST_WORDS:
                continue
            seen.add(doc)
            pairs[path_split(f"{path}:{root}", _SPLIT)].append(Pair(doc, body, domain))
    if not pairs["train"]:
        raise UserError(
            "stdlib_pairs: this Python's standard library holds no functions with docstrings; "
            "use another Python or 'text_pairs'."
        )
    return pair_sources("stdlib_pairs", pairs, list(DOMAINS), length=length, vocab_size=vocab_size)


def functions(data: bytes) -> Iterator[tuple[str, str, str]]:
    """Yields (outermost name around it, docstring, the lines after it) of the functions of a file, if Python can read
    it."""
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError):
        return
    lines = _LINE_END.split(data.decode())
    for root in tree.body:
        for node in ast.walk(root):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (doc := ast.get_docstring(node)):
                yield (
                    root.name if isinstance(root, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else "",
                    doc,
                    textwrap.dedent("\n".join(lines[node.body[0].end_lineno : node.end_lineno])),
                )
