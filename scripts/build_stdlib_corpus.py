"""Extract the retrieval corpus of standard library docstrings that rankernel ships.

Reads the ``.py`` files of the running interpreter's standard library with ``ast`` (nothing is imported) and writes
``documents.jsonl``, ``queries.jsonl``, ``qrels.txt`` and ``LICENSE.txt``. A query is the first sentence of a docstring;
its document is the qualified name, the signature and the rest of that docstring, never that first sentence. The output
depends only on the interpreter's sources, so the same patch release always gives the same bytes.

    python scripts/build_stdlib_corpus.py            # writes python/rankernel/assets/stdlib
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import platform
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "python" / "rankernel" / "assets" / "stdlib"

# Tests, vendored code and generated tables: their docstrings describe fixtures, other projects or nothing.
SKIPPED_DIRECTORIES = {
    "__pycache__",
    "ensurepip",
    "encodings",
    "idle_test",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}

# Modules that share text (one documents the other's functions again) have to fall into the same split.
FAMILIES = {
    "genericpath": "os",
    "ntpath": "os",
    "posixpath": "os",
    "pathlib": "os",
    "asynchat": "asyncore",
    "smtpd": "asyncore",
    "collections_abc": "collections",
    "compat_pickle": "pickle",
    "pickletools": "pickle",
    "gzip": "compression",
    "bz2": "compression",
    "lzma": "compression",
    "sre_compile": "re",
    "sre_constants": "re",
    "sre_parse": "re",
    "cgitb": "cgi",
    "cProfile": "profile",
    "pyio": "io",
    "pydecimal": "decimal",
    "imp": "importlib",
    "pkgutil": "importlib",
    "runpy": "importlib",
    "zipimport": "importlib",
}

MIN_QUERY_WORDS = 4
MAX_QUERY_WORDS = 40
MIN_DOCUMENT_WORDS = 8
MAX_DOCUMENT_CHARACTERS = 2000
MAX_RELEVANT = 4
SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z`'\"(\[]|\s*$)")
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")


@dataclass(frozen=True)
class Entry:
    """One docstring: ``query`` is its first sentence, ``document`` what the sentence is to be matched with."""

    split: str
    query: str
    document: str


def split_of(package: str) -> str:
    """Return the split of a top-level package: 80 train, 8 validation and 12 heldout of 100 hash buckets."""
    family = FAMILIES.get(package.lstrip("_"), package.lstrip("_"))
    bucket = int.from_bytes(hashlib.sha256(f"rankernel-stdlib-85:{family}".encode()).digest()[:8], "big") % 100
    return "train" if bucket < 80 else "validation" if bucket < 88 else "heldout"


def one_line(text: str) -> str:
    """Collapse all white space."""
    return " ".join(text.split())


def first_sentence(docstring: str) -> tuple[str, str]:
    """Split a docstring after its first sentence, or after its first paragraph if no sentence ends there."""
    paragraph, _, rest = docstring.partition("\n\n")
    end = SENTENCE_END.search(paragraph)
    if end is None:
        return one_line(paragraph), one_line(rest)
    return one_line(paragraph[: end.end()]), one_line(paragraph[end.end() :] + "\n" + rest)


def parameters_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return the parameters as written, without annotations and without ``self`` or ``cls``."""
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    text = ast.unparse(node.args)
    return re.sub(r"^(self|cls)(, /)?(, |$)", "", text)


def signature_of(node: ast.AST, qualified_name: str) -> str:
    """Return ``name(parameters)``; a class takes the parameters of its ``__init__``; a module has its name alone."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return f"{qualified_name}({parameters_of(node)})"
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and member.name == "__init__":
                return f"class {qualified_name}({parameters_of(member)})"
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {qualified_name}({bases})" if bases else f"class {qualified_name}"
    return f"module {qualified_name}"


def documented_nodes(node: ast.AST, qualified_name: str) -> Iterator[tuple[ast.AST, str, str]]:
    """Yield (node, qualified name, docstring) of a module, its classes and its functions, in source order."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = ast.get_docstring(node, clean=True)
        if docstring:
            yield node, qualified_name, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from documented_nodes(child, f"{qualified_name}.{child.name}")
        elif isinstance(child, (ast.If, ast.Try)):
            yield from documented_nodes(child, qualified_name)


def is_query(sentence: str) -> bool:
    """Tell prose from signatures, interpreter sessions and headings."""
    words = sentence.split()
    prose = sum(1 for word in words if re.fullmatch(r"[\"'`(]*[A-Za-z][A-Za-z'/-]*[\"'`).,:;!?]*", word))
    return MIN_QUERY_WORDS <= len(words) <= MAX_QUERY_WORDS and "->" not in sentence and prose >= 0.7 * len(words)


def read_entries(stdlib: Path) -> Iterator[Entry]:
    """Yield the entries of every module below ``stdlib``, in the order of their paths."""
    for path in sorted(stdlib.rglob("*.py"), key=lambda p: p.relative_to(stdlib).as_posix()):
        relative = path.relative_to(stdlib)
        if any(part in SKIPPED_DIRECTORIES or part.startswith("config-") for part in relative.parts):
            continue
        module_parts = [*relative.parts[:-1], relative.stem]
        if module_parts[-1] == "__init__":
            module_parts.pop()
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            # Grammar fixtures and templates are not meant to compile.
            continue
        for node, qualified_name, docstring in documented_nodes(tree, ".".join(module_parts)):
            sentence, rest = first_sentence(inspect.cleandoc(docstring))
            document = one_line(f"{signature_of(node, qualified_name)} {rest}")
            if len(document) > MAX_DOCUMENT_CHARACTERS:
                document = document[:MAX_DOCUMENT_CHARACTERS].rsplit(" ", 1)[0]
            yield Entry(split_of(module_parts[0]), sentence, document)


def build(stdlib: Path) -> tuple[list[dict[str, str]], list[dict[str, str]], list[tuple[str, str]]]:
    """Return (documents, queries, (query id, document id) pairs) of a standard library tree.

    A sentence becomes a query if it reads as prose, its document has something to match
    (``MIN_DOCUMENT_WORDS`` words, identifiers counted by their parts), it does not occur in that document, and it
    names at most ``MAX_RELEVANT`` documents. A sentence found in an earlier split is not asked again in a later one.
    Everything else stays as a document without a query.
    """
    documents: dict[str, dict[str, str]] = {}
    relevant: dict[tuple[str, str], list[str]] = defaultdict(list)
    for entry in read_entries(stdlib):
        if entry.document not in documents:
            documents[entry.document] = {
                "id": f"d{len(documents):05d}",
                "text": entry.document,
                "split": entry.split,
            }
        document = documents[entry.document]
        if (
            document["split"] == entry.split
            and is_query(entry.query)
            and len(WORD.findall(entry.document)) >= MIN_DOCUMENT_WORDS
            and entry.query.lower().rstrip(".!?") not in entry.document.lower()
        ):
            ids = relevant[entry.split, entry.query]
            if document["id"] not in ids:
                ids.append(document["id"])
    queries: list[dict[str, str]] = []
    pairs: list[tuple[str, str]] = []
    seen: set[str] = set()
    for split in ("train", "validation", "heldout"):
        texts = [text for owner, text in relevant if owner == split and text not in seen]
        seen.update(texts)
        for text in texts:
            if len(relevant[split, text]) <= MAX_RELEVANT:
                query_id = f"q{len(queries):05d}"
                queries.append({"id": query_id, "text": text, "split": split})
                pairs.extend((query_id, document_id) for document_id in relevant[split, text])
    return list(documents.values()), queries, pairs


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """Write one JSON object a line, ASCII, with a newline after the last."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    output = parser.parse_args().output
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    documents, queries, pairs = build(stdlib)
    output.mkdir(parents=True, exist_ok=True)
    write_jsonl(output / "documents.jsonl", documents)
    write_jsonl(output / "queries.jsonl", queries)
    lines = "".join(f"{query} 0 {document} 1\n" for query, document in pairs)
    (output / "qrels.txt").write_text(lines, encoding="ascii")
    notice = (
        f"The texts in documents.jsonl and queries.jsonl are docstrings, names and signatures taken from the\n"
        f"standard library of Python {platform.python_version()}, with white space collapsed and long texts cut.\n"
        f"Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved.\n"
        f"They are used under the licence that follows, which is the one distributed with that release.\n\n"
    )
    licence = (stdlib / "LICENSE.txt").read_text(encoding="utf-8")
    (output / "LICENSE.txt").write_text(notice + licence, encoding="utf-8")
    for split in ("train", "validation", "heldout"):
        print(
            f"{split:10s} documents {sum(d['split'] == split for d in documents):5d}"
            f"  queries {sum(q['split'] == split for q in queries):5d}"
        )


if __name__ == "__main__":
    main()
