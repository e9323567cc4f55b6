"""Files and folders that are whole or absent: written under another name, synced, then renamed.

A kill or a full disk leaves the old one or the new one, never half of one. A folder takes two
renames: a kill between them leaves the old folder as <name>.old, and the next attempt restores it.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from nanogsm import UserError, distributed

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk. A rename is durable only after this. Windows cannot."""
    if os.name != "nt":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network drives cannot
                raise
        finally:
            os.close(fd)


def remove(path: Path) -> None:
    """Delete a file or folder. A folder is first renamed to .tmp, so half of it is never used."""
    if path.is_dir() and not path.is_symlink():
        if path.suffix != ".tmp":
            doomed = path.with_name(path.name + ".tmp")
            shutil.rmtree(doomed, ignore_errors=True)
            path = path.rename(doomed)
        shutil.rmtree(path, ignore_errors=True)  # leftovers (NFS, Windows) go at the next start
    else:
        path.unlink(missing_ok=True)


def strict(value):
    """`value` with None for every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(obj, indent: int | None = None) -> bytes:
    # A model can emit a lone surrogate, which UTF-8 cannot encode. It is written as a JSON escape.
    text = json.dumps(strict(obj), indent=indent, allow_nan=False, ensure_ascii=False)
    return text.encode(errors="backslashreplace") + b"\n"


def replace_file(path: Path, chunks: bytes | Iterable, shared: bool = False) -> None:
    """Write a file atomically: a reader sees the old one or the new one, never half of one.

    shared: several processes may write the file at once (a download), so each uses a temporary name
    of its own. Otherwise the name is fixed, and the next attempt overwrites what a killed one left.
    Trap: a link at `path` is replaced, not followed.
    """
    own = f".{os.getpid()}.{secrets.token_hex(4)}" if shared else ""
    temporary = path.with_name(f"{path.name}{own}.tmp")
    try:
        write(temporary, [chunks] if isinstance(chunks, bytes) else chunks)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # what made writing fail may make this fail, too
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextlib.contextmanager
def replaced_folder(folder: Path | str) -> Iterator[Path]:
    """`with replaced_folder(f) as new`: the block fills the empty folder `new`, which then replaces
    f. If anything fails, f stays as it was."""
    folder = Path(folder)
    new, old = (folder.with_name(folder.name + ending) for ending in (".new", ".old"))

    def put_back() -> None:
        if os.path.lexists(old) and not os.path.lexists(folder):
            old.rename(folder)

    put_back()  # an earlier attempt may have been killed between the two renames
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        sync_folder(new)
        remove(old)
        if os.path.lexists(folder):  # a folder cannot be renamed onto one that has files
            folder.rename(old)
        new.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        put_back()
        shutil.rmtree(new, ignore_errors=True)
        raise
    remove(old)


def same_place(a: str | None, b: str | None) -> bool:
    """Whether two paths or names, as a user typed them, mean the same place."""
    return os.path.abspath(str(a)) == os.path.abspath(str(b))


def one_line(error: BaseException) -> str:
    """The message of any exception on one line, cut at 200 characters."""
    try:
        text = str(error)
    except Exception:  # of a class whose __str__ fails
        text = ""
    return " ".join(text.split())[:200] or type(error).__name__


def read_json(path: Path) -> dict:
    """The JSON object in a file. UserError if the file does not hold one."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


# What the two texts may be called; the last are MATH's names.
PAIRS = (("question", "answer"), ("prompt", "completion"), ("problem", "solution"))


def json_lines(path: Path) -> list[dict]:
    """The rows of a JSONL file that this project has written. UserError if it cannot be read."""
    try:
        lines = path.read_text("utf-8").split("\n")  # splitlines would split at U+2028
        return [json.loads(line) for line in lines if line]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error


def read_pairs(path: Path) -> list[tuple[int, str, str]]:
    """(line number, question, answer) of a JSONL file, one JSON object per line. It has the two
    texts of one of PAIRS, or "messages": one user turn and one assistant turn, each with "role" and
    "content", perhaps after a system turn, whose text then begins the question. UserError names the
    file and the line at fault."""
    try:  # utf-8-sig: Windows editors put a byte order mark first
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start})") from e
    pairs, fields = [], ("question", "answer")
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would split at U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            fields = next((p for p in PAIRS if isinstance(row, dict) and p[0] in row), PAIRS[0])
            question, answer = (text.strip() for text in _two_texts(row, fields))
            (question + answer).encode()
        except UserError as e:
            raise UserError(f"{path} line {number}: {e}") from e
        except UnicodeEncodeError as e:
            half = rf"\u{ord(e.object[e.start]):04x}"  # which is valid JSON, but not text
            raise UserError(f"{path} line {number}: {half} is half of a character (a surrogate "
                            "without its pair)") from e  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            missing = f"; {e} is missing" if isinstance(e, KeyError) else ""
            names = f'"{fields[0]}" and "{fields[1]}"'
            wanted = f"a JSON object with {names} texts, one object per line"
            raise UserError(f"{path} line {number}: not {wanted}{missing}") from e
        if not question:
            raise UserError(f"{path} line {number}: the question is empty")
        if not answer:
            raise UserError(f"{path} line {number}: the answer is empty")
        pairs.append((number, question, answer))
    if not pairs:
        raise UserError(f"{path} has no problems in it")
    return pairs


def _two_texts(row: dict, fields: tuple[str, str]) -> list[str]:
    """The question and the answer of a row, as they are."""
    if "messages" not in row:
        return [row[name] for name in fields]
    turns = row["messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError('messages must be a list of objects with "role" and "content"')
    roles = [turn.get("role", "a turn without a role") for turn in turns]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        shown = ", ".join(map(str, roles))[:80]
        wanted = "one user and one assistant turn, after at most one system turn"
        raise UserError(f"messages must be {wanted}, not {shown or 'none'}")
    for turn in turns:
        content, fault = turn.get("content"), f"the content of the {turn['role']} turn"
        if "content" not in turn:
            raise UserError(f"{fault} is missing")
        if isinstance(content, list):
            raise UserError(f"{fault} is a list of parts: join their texts to one")
        if not isinstance(content, str):
            raise UserError(f"{fault} is {json.dumps(content)[:40]}, not a text")
    *asked, answer = [turn["content"] for turn in turns]
    return ["\n\n".join(text.strip() for text in asked), answer]


def write_json(path: Path | str, obj) -> None:
    """Write `obj` as JSON, atomically: a reader sees the old file or the new one.

    NaN and infinity become null. A metric that is undefined once (the explained variance of equal
    returns) must not end a long run, and a bare NaN would make the file invalid for other readers.
    """
    replace_file(Path(path), to_json(obj, indent=1))


def write(path: Path, chunks: Iterable) -> dict:
    """Write chunks of bytes, force them to disk and return their size and SHA-256."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def write_tensors(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict:
    """Write a safetensors file, in dtype if given, else each tensor in its own. Returns its size
    and SHA-256."""
    return write(path, safetensors_bytes(tensors, dtype))


def give_parts(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """What another rank does while rank 0 writes the same tensors: it gives its parts of them."""
    for name in _in_order(tensors, dtype):
        distributed.whole(tensors[name].detach())


def _in_order(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> list[str]:
    """Widest type first: every tensor then starts at a multiple of its own item size."""
    return sorted(tensors, key=lambda name: (-(dtype or tensors[name].dtype).itemsize, name))


def safetensors_bytes(
    tensors: dict[str, Tensor], dtype: torch.dtype | None = None, metadata: dict | None = None
) -> Iterator:
    """The bytes of a safetensors file, one tensor at a time. metadata: texts by name.

    safetensors.torch.save_file needs all tensors on the CPU, contiguous and unshared at once, and
    it reports a full disk as an error of its own. Here a GPU tensor or a strided tensor costs one
    temporary copy, and a plain CPU tensor none. Tied tensors are written, and load, separately.
    """
    dtypes = {name: dtype or t.dtype for name, t in tensors.items()}
    names = _in_order(tensors, dtype)
    header, offset = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0
    for name in names:
        end = offset + tensors[name].numel() * dtypes[name].itemsize
        header[name] = {"dtype": DTYPES[dtypes[name]], "shape": list(tensors[name].shape),
                        "data_offsets": [offset, end]}  # fmt: skip
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        t = distributed.whole(tensors[name].detach()).to("cpu", dtypes[name]).contiguous()
        yield t.reshape(-1).view(torch.uint8).numpy()
