"""Names -> files on this disk: models (Hub ids, folders, run folders) and the pinned files of GSM8K
and MATH.

Two functions do the work, and both return paths: `find_model("google/gemma-2b-it")` and
`data_file("train.jsonl")`. Whatever goes wrong (licence not accepted, no network, full disk,
incomplete download) becomes a UserError of one line. Nothing is ever unpickled, no downloaded
index may point out of its folder, and a data file is used only if its SHA-256, or that of its rows,
is the one below. huggingface_hub is slow to import, so it is imported only where it is needed.
"""

import errno
import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from nanogsm import UserError
from nanogsm.store import files

REQUIRED = ["config.json", "tokenizer.json"]
OPTIONAL = [
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "tokenizer.model",
]  # fmt: skip
WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]
EMBEDDED = Path(__file__).parents[1] / "tiny" / "gemma"  # the embedded model
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]*")  # a branch, tag or commit
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")  # a plain name: no way out


class ModelFiles(NamedTuple):
    base: Path  # a folder in the Hub's layout: config.json, tokenizer.json, *.safetensors
    adapter: Path | None  # a folder in PEFT's layout, or None
    # The base in records: "tiny", a Hub id (perhaps with @revision), or a folder's absolute path.
    name: str


def find_model(name: str, weights: bool = True, base: str | None = None) -> ModelFiles:
    """Find a model's files on this disk. `name` is "tiny" (the embedded model), a run folder, an
    adapter, a model folder or a Hub id, of a model or of an adapter. owner/name@revision is one
    branch, tag or commit. What is on the Hub is downloaded, or taken from the Hub's cache if there
    is no network. `base` replaces the base model that an adapter names.

    UserError says what is missing and what to do. weights=False neither downloads nor requires
    weights, which is enough for a --dry-run.

    Trap: a local folder called owner/name hides the Hub's model of that name. Likewise "tiny" is
    the embedded model, and a folder called tiny has to be written ./tiny.
    """
    found = _find(name, weights, base)
    if base is not None and not found.adapter:
        raise UserError(f"--base {base} names the base of an adapter, but {name} is a whole model")
    return found


def _find(
    name: str, weights: bool, base: str | None = None, base_of: str | None = None
) -> ModelFiles:
    """base_of: the adapter whose base this is to be, and which must not be an adapter itself."""
    if name == "tiny":
        return ModelFiles(EMBEDDED, None, name)
    folder = Path(os.path.expanduser(name))
    if name and os.path.isdir(folder):  # unlike Path.is_dir, never raises
        return _local_model(folder, weights, base, base_of)
    if name and os.path.exists(folder):
        raise UserError(f"{name} is a file: give the folder it is in")
    if name.startswith("runs/"):
        raise UserError(f"there is no {name}: train it first, or see what is in runs/")
    if not is_hub_id(name):
        raise UserError(f"no such folder: {name!r}; a Hub model is written owner/name")
    return _hub_model(name, weights, base, base_of)


def is_hub_id(name: str) -> bool:
    repo, at, revision = name.partition("@")
    return bool(HUB_ID.fullmatch(repo) and (not at or REVISION.fullmatch(revision)))


def _adapter_in(folder: Path) -> Path | None:
    """A run's adapter wins over its merged model/, because merging rounds the weights."""
    places = (folder / "adapter", folder)
    return next((path for path in places if (path / "adapter_config.json").is_file()), None)


def _local_model(folder: Path, weights: bool, base: str | None, base_of: str | None) -> ModelFiles:
    for run in (folder, folder.absolute().parent):  # the folder may be a run's model/ or adapter/
        if "outcome" in run_record(run).get("args", {}):
            raise UserError(f"{folder} is a process reward model of train_prm.py, not a language "
                            "model: give it as --rerank to evaluate.py")  # fmt: skip
    return find_trunk(folder, weights, base, base_of)


def find_trunk(
    folder: Path, weights: bool = True, base: str | None = None, base_of: str | None = None
) -> ModelFiles:
    """`find_model` of a folder, also where it is no language model but another's network."""
    unfinished = (folder / "checkpoint").is_dir() and not (folder / "summary.json").is_file()
    if unfinished and (folder / "run_args.json").is_file():
        raise UserError(
            f"{folder} is a run whose training has not finished; run the same training command "
            "again to continue"
        )
    if adapter := _adapter_in(folder):
        _refuse_as_base(str(folder), base_of)
        return _adapted_model(adapter, weights, base)
    model = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    if (model / "config.json").is_file():
        _check_complete(model, weights)
        return ModelFiles(model, None, os.path.abspath(model))
    if (folder / "summary.json").is_file():
        raise UserError(f"{folder} is a finished run whose weights have been deleted")
    if (folder / "run_args.json").is_file() or (folder / "checkpoint").is_dir():
        raise UserError(
            f"{folder} has no model/ or adapter/ yet because training has not finished; "
            "run the same training command again to continue"
        )
    raise UserError(
        f"{folder} is not a model or a run folder: it has no config.json, "
        "adapter_config.json, model/ or adapter/"
    )


def _refuse_as_base(name: str, base_of: str | None) -> None:
    if base_of is not None:  # a circle of adapters ends here, too
        raise UserError(f"the base model of {base_of} is another adapter, {name}: merge that first")


def _adapted_model(
    adapter: Path, weights: bool, base: str | None, repo: str | None = None
) -> ModelFiles:
    """An adapter and its base. repo: the Hub id that the adapter was downloaded from."""
    config_file = adapter / "adapter_config.json"
    # A stranger's file must not choose what is read on this disk. A local one may.
    untrusted = repo is not None and base is None
    name = base if base is not None else _named_base(config_file, untrusted)
    if weights and not (adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"{adapter} has no adapter_model.safetensors (.bin files are never read)")
    if untrusted and not is_hub_id(name):
        raise UserError(
            f"{repo} is an adapter whose base model, {name!r}, is not on the Hub: name the base "
            "yourself with --base"
        )
    if repo is None and base is None:
        _check_recorded_base(adapter, name)
    find = _hub_model if untrusted else _find
    try:
        found = find(name, weights, base_of=repo or str(adapter))
    except UserError as error:
        source = "given as --base" if base is not None else f"named in {config_file}"
        advice = "" if base is not None else "; --base names another"
        raise UserError(f"{error} (the base model {source}{advice})") from error
    return ModelFiles(found.base, adapter, found.name)


def _check_recorded_base(adapter: Path, name: str) -> None:
    """Raise UserError if a folder here has come to hide the Hub's model that a run was trained
    on."""
    base = run_record(adapter.parent).get("info", {}).get("base")
    if not isinstance(base, str):
        return  # not a run's adapter
    if HUB_ID.fullmatch(name) and os.path.isdir(name) and not files.same_place(base, name):
        raise UserError(
            f"{name} is a folder here, but the run in {adapter.parent} was trained on {base}: "
            "name one of them with --base"
        )


def run_record(folder: Path) -> dict:
    """run_args.json, which says what a run was trained on and how. {} if it is no run."""
    try:
        record = json.loads((folder / "run_args.json").read_bytes())
        return record if {type(record["args"]), type(record["info"])} == {dict} else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _named_base(config_file: Path, untrusted: bool) -> str:
    """The base model that adapter_config.json names. A revision counts for a Hub id only."""
    config = files.read_json(config_file)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise UserError(f"{config_file} does not name its base model (base_model_name_or_path)")
    is_local = os.path.isdir(os.path.expanduser(name)) and not untrusted
    if revision in (None, "") or is_local or not HUB_ID.fullmatch(name):
        return name
    if not isinstance(revision, str) or not REVISION.fullmatch(revision):
        raise UserError(f"{config_file}: the revision {revision!r} is not a branch, tag or commit")
    return f"{name}@{revision}"


def _check_complete(folder: Path, weights: bool) -> None:
    for name in REQUIRED:
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}, and no other file can replace it")
    for file in [*(folder / name for name in REQUIRED), *(weight_files(folder) if weights else ())]:
        with open(file, "rb") as start:
            if start.read(19) == b"version https://git":
                raise UserError(f"{file} is a Git LFS pointer, not the file: run `git lfs pull`")


# ---- weights ----


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The safetensors files that hold a model's weights: {file: names of the tensors that the
    index puts there}, or {model.safetensors: None} without an index.

    UserError: there is no safetensors file, shards are missing, the index is not a str -> str map,
    or the index or a link points out of the folder. Trap: if there are both a single file and an
    index, the single file wins, as in transformers.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if os.path.lexists(single):  # a dangling link counts, and is then reported as missing
        shards = {single: None}
    elif index.is_file():
        shards = {}
        for tensor, name in _weight_map(index).items():
            shards.setdefault(folder / name, set()).add(tensor)
    else:
        raise UserError(
            f"{folder} has no safetensors weights (model.safetensors or {index.name}); "
            ".bin (pickle) and .gguf files are never read: choose a model with safetensors"
        )
    missing = sorted(path.name for path in shards if not path.is_file())
    if missing:
        raise UserError(f"{folder} is incomplete, missing: {', '.join(missing)}")
    for path in shards:
        if not _stays_inside(path):
            raise UserError(f"{path} is a link out of its folder: replace it with the file itself")
    return shards


def fingerprint(found: ModelFiles) -> str:
    """SHA-256 over the size of each weight file (base and adapter) and 64 evenly spaced pieces of
    4 kB. With it a run refuses to continue from weights that have been replaced under the same
    name. Training changes every weight, so a sample is enough, and it is fast for any model."""
    digest = hashlib.sha256()
    paths = sorted(weight_files(found.base))
    if found.adapter:
        paths.append(found.adapter / "adapter_model.safetensors")
        config = files.read_json(found.adapter / "adapter_config.json")
        scale = {key: config.get(key) for key in ("r", "lora_alpha", "use_rslora")}
        digest.update(json.dumps(scale).encode())
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for i in range(64):
                file.seek(i * size // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map of tensor names to file names")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise UserError(
                f"{index}: the file of {tensor} is {name!r}, which is not "
                "the plain name of a .safetensors file in the same folder"
            )
    return weight_map


def _stays_inside(path: Path) -> bool:
    """Whether a file, with links resolved, lies in its own folder. A snapshot in the Hub's cache
    may also link to the cache's blobs: snapshots/<commit>/x -> ../../blobs/y. There y may be a
    link to <cache>/blobs, which all repositories share since huggingface_hub 2."""
    folder, target = path.parent.resolve(), path.resolve()
    roots = [folder]
    repo = folder.parent.parent
    if folder.parent.name == "snapshots" and repo.name.startswith("models--"):
        roots += [repo / "blobs", repo.parent / "blobs"]
    return any(target.is_relative_to(root) for root in roots)


# ---- the Hub ----


def _offline() -> bool:
    """Read at every call. huggingface_hub reads the variable only once, at import."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # huggingface_hub obeys either
    return any(os.environ.get(n, "").upper() in ("1", "ON", "YES", "TRUE") for n in names)


def _hub_model(
    name: str, weights: bool, base: str | None = None, base_of: str | None = None
) -> ModelFiles:
    """A model or an adapter of the Hub. A repository with both kinds of file is an adapter, like a
    folder with both."""
    repo, _, revision = name.partition("@")
    # An adapter's repository may have no config.json, so in the cache neither is required.
    kinds = ["config.json", "adapter_config.json"]
    look = _snapshot(repo, revision or None, kinds, ["adapter_config.json"])
    # The rest is of the same commit, even if somebody pushes another one in between.
    commit = look.name
    if (look / "adapter_config.json").is_file():
        _refuse_as_base(name, base_of)
        wanted = ADAPTER if weights else ADAPTER[:1]

        def complete(folder: Path) -> None:
            if missing := [file for file in wanted if not (folder / file).is_file()]:
                raise UserError(f"it has no {missing[0]} (.bin files are never read)")
            if link := [file for file in wanted if not _stays_inside(folder / file)]:
                raise UserError(f"{folder / link[0]} is a link out of its folder")

        adapter = _snapshot(repo, commit, wanted, wanted, complete)
        return _adapted_model(adapter, weights, base, name)
    wanted = REQUIRED + OPTIONAL + (WEIGHTS if weights else [])
    complete = functools.partial(_check_complete, weights=weights)
    return ModelFiles(_snapshot(repo, commit, wanted, REQUIRED, complete), None, name)


def _snapshot(
    repo: str, revision: str | None, wanted: list[str], required: list[str],
    check: Callable[[Path], None] = lambda folder: None,
) -> Path:  # fmt: skip
    """The folder with the wanted files of a repository, downloaded or from the cache. It has the
    name of its commit. check(folder) raises UserError for an incomplete one."""
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str], offline: bool) -> Path:
        return Path(snapshot_download(
            repo, revision=revision, allow_patterns=patterns, local_files_only=offline
        ))  # fmt: skip

    try:
        found = fetch(wanted, _offline())
    except Exception as error:
        reason = _hub_problem(repo, error)
        if reason is None:
            raise
        try:  # the cache may already have all files that are required
            found = fetch(required, True)
            check(found)
        except Exception:
            raise UserError(reason) from error
    try:
        check(found)
    except UserError as error:
        hint = " (unset HF_HUB_OFFLINE once to complete a partial copy)" if _offline() else ""
        raise UserError(f"{repo}: {error}{hint}") from error
    return found


def _hub_problem(repo: str, error: BaseException) -> str | None:
    """One line about an error of the Hub's client, or None if the user cannot repair it.

    The client wraps its errors (a 503 arrives as the cause of a LocalEntryNotFoundError), so the
    whole chain counts. GatedRepoError comes first: it is also a RepositoryNotFoundError.
    """
    from huggingface_hub import errors

    chain, one_line = [error], files.one_line(error)
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)

    def is_any(*kinds: type) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    answers = [link.response for link in chain if isinstance(link, errors.HfHubHTTPError)]
    status = answers[0].status_code if answers else 0
    absent = is_any(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    # The Rust downloader raises a RuntimeError without errno, but with the same words.
    full = any("No space left" in str(e) or getattr(e, "errno", 0) == errno.ENOSPC for e in chain)
    # errors.HTTPError is the Hub client's name for the base class of httpx's errors.
    unreached = absent or is_any(errors.HTTPError, ConnectionError, TimeoutError)
    local = "or give a local folder"
    for applies, message in [
        (full, "disk full while downloading: free space, or set HF_HOME to a larger disk"),
        (is_any(errors.GatedRepoError),
         f"gated: accept its licence at https://huggingface.co/{repo}, then run `hf auth login` or "
         "set HF_TOKEN; or use an ungated mirror such as unsloth/gemma-2b-it, or a local folder"),
        (is_any(errors.RevisionNotFoundError), "it has no such revision: check what follows the @"),
        (is_any(errors.RepositoryNotFoundError),
         "no such folder here and no such model on the Hub: check the spelling "
         "(a private model needs `hf auth login` or HF_TOKEN)"),
        (status == 429, "too many requests to the Hub (429): wait a few minutes and try again"),
        (status >= 500, f"the Hub failed ({status}) and the cache has no complete copy: try later"),
        (status >= 400, f"the Hub refused ({status}); `hf auth login` may help: {one_line}"),
        (_offline() and is_any(errors.IncompleteSnapshotError),
         "only part of it is in the Hub's cache: unset HF_HUB_OFFLINE once to complete it"),
        (_offline() and absent,
         "no such folder here, and not in the Hub's cache: unset HF_HUB_OFFLINE once to "
         f"download it, {local}"),
        (unreached,
         f"no such folder here, and no network to the Hub: check the connection, {local}"),
        (isinstance(error, (OSError, RuntimeError, errors.HFValidationError)),
         f"the download failed: {one_line}"),
    ]:  # fmt: skip
        if applies:
            return f"{repo}: {message}"
    return None


# ---- GSM8K and MATH ----


class DataFile(NamedTuple):
    bytes: int
    rows: int
    sha256: str
    rows_sha256: str | None  # of the questions and answers in their order, however they are written
    urls: tuple[str, ...] = ()  # whole ones, for a file that the folders in DATA_URLS do not have


# --data -> the file's name here. (GSM8K's and MATH's files may lie in one folder.)
DATA_NAMES = {
    "main": "{}.jsonl",
    "socratic": "{}_socratic.jsonl",
    "math": "math_{}.jsonl",
    "math500": "math500.jsonl",
}
_TORA = (
    "https://raw.githubusercontent.com/microsoft/ToRA/"
    "213c1c995038c73fab10343814df7a42f990f026/src/data/math/"
)
DATA_FILES = {
    "train.jsonl": DataFile(
        4_166_206, 7473, "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        "78212a281c5c91ee0a8a573ee3387c55d62493ea1853a46f94668e8382b45bf6"),
    "test.jsonl": DataFile(
        749_738, 1319, "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        "9ba9db83465ec4c9450b62c0dc13a69505d69a27c6a0817d7dfa679b496276e9"),
    "train_socratic.jsonl": DataFile(
        5_401_739, 7473, "153d86551187cfd64ef7afb59bfd0ef75cea3ae9388e7ad31e43920b6dd77872", None),
    "test_socratic.jsonl": DataFile(
        972_978, 1319, "c96673362fa7a699f4836a9b6474a067448f95fe58064727501ee63ba4c3fdb6",
        "9e196628ee9adb7d9d2d06cd8d1f421295f718d0c7f7204d50ccb1176caa7cf6"),
    "math_train.jsonl": DataFile(
        6_466_173, 7500, "2183510c9fb78547bd1756f8043269ff4bea97a9fc16852c73d60d8a64c06ad1", None,
        (_TORA + "train.jsonl",)),
    "math_test.jsonl": DataFile(
        4_101_364, 5000, "3371949f33dd702d04b43fddd7d53a028de0aaca0e76abb1b875a050297b3aa4", None,
        (_TORA + "test.jsonl",)),
    "math500.jsonl": DataFile(
        446_564, 500, "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132", None,
        ("https://huggingface.co/datasets/HuggingFaceH4/MATH-500/resolve/"
         "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be/test.jsonl",
         "https://media.githubusercontent.com/media/openai/prm800k/"
         "7ecc794703b2877f63226f2477a49b34f9b25163/prm800k/math_splits/test.jsonl")),
    # PRM800K's phase 1, whose rows we have not counted. The second address has a copy by others.
    "phase1_train.jsonl": DataFile(
        7_900_236, 0, "e9da6a73f827ffb9a8c0dc644c541d34ed76b3d4d1e4896ff5f7b37ddf5ae34d", None,
        ("https://media.githubusercontent.com/media/openai/prm800k/"
         "7ecc794703b2877f63226f2477a49b34f9b25163/prm800k/data/phase1_train.jsonl",
         "https://huggingface.co/datasets/tasksource/PRM800K/resolve/"
         "547b19506677a59037ee888838834b65e9b1ddd4/phase1_train.jsonl")),
}  # fmt: skip
# Sources of GSM8K's files, in the order they are tried. openai/gsm8k on the Hub has only parquet
# files. The last two are copies by other people, and the digests make them safe to use.
DATA_URLS = [
    "https://raw.githubusercontent.com/openai/grade-school-math/"
    "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/",
    "https://huggingface.co/datasets/budecosystem/gsm8k/resolve/main/gsm8k/",
    "https://huggingface.co/datasets/DaertML/gsm8k-jsonl/resolve/main/",
]
READ_TIMEOUT = 20.0  # seconds without a byte
DOWNLOAD_TIMEOUT = 300.0  # seconds for a whole file; ends a download that only trickles


def cache_folder() -> Path:
    """Folder for data files: $NANOGSM_CACHE, $XDG_CACHE_HOME/nanogsm or ~/.cache/nanogsm."""
    folder = os.environ.get("NANOGSM_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "nanogsm"
    )
    return Path(os.path.expanduser(folder))


def data_file(name: str, data_dir: str | Path | None = None) -> Path:
    """Path of a data file (a key of DATA_FILES): in data_dir if given, else from the cache, GitHub
    or a mirror. It has the right SHA-256, or the same rows in the same order, written otherwise.

    UserError says what was tried and how to put the file there by hand. Trap: with a data_dir
    nothing is downloaded. A missing or changed file in it is an error.
    """
    want = DATA_FILES[name]
    by_hand = f"download {_sources(name)[0]} by hand{f' as {name}' * bool(want.urls)}"
    path = Path(os.path.expanduser(data_dir)) / name if data_dir else cache_folder() / name
    problem = _file_problem(path, want)
    if problem is None:
        return path
    if data_dir:
        raise UserError(
            f"{path}: {problem}; {by_hand} into that folder, or leave out --data-dir "
            "(and NANOGSM_DATA_DIR) to have it downloaded; other problems are --data FILE.jsonl"
        )
    tried = [f"{path}: {problem}"]  # a damaged copy in the cache is replaced
    data = _download(name, want, tried)
    if data is None:
        raise UserError(
            f"cannot get {name} (tried {'; '.join(tried)}): {by_hand} into {path.parent}, "
            "or into any folder that you then give as --data-dir"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_file(path, data, shared=True)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; set NANOGSM_CACHE to a folder with space that "
            "you can write to"
        ) from error
    return path


def _sources(name: str) -> list[str]:
    return [*DATA_FILES[name].urls] or [folder + name for folder in DATA_URLS]


def _download(name: str, want: DataFile, tried: list[str]) -> bytes | None:
    """The verified bytes from the first source that works. Failures are added to `tried`."""
    if _offline():
        tried.append("no network: HF_HUB_OFFLINE is set")
        return None
    for url in _sources(name):
        print(f"downloading {url}", flush=True)
        try:
            data = _fetch(url, want.bytes)
            problem = _problem(data, want)
        except (OSError, HTTPException) as error:
            problem = files.one_line(error)
        if problem is None:
            return data
        tried.append(f"{url.split('/')[2]}: {problem}")
    return None


def _fetch(url: str, size: int) -> bytes:
    end, data = time.monotonic() + DOWNLOAD_TIMEOUT, b""
    with urlopen(url, timeout=READ_TIMEOUT) as response:
        # read1 returns after one packet. read() would wait for a whole trickling file.
        while len(data) <= size and (piece := response.read1(1 << 16)):
            data += piece
            if time.monotonic() > end:
                raise TimeoutError(f"not finished after {DOWNLOAD_TIMEOUT:.0f} seconds")
    return data


def _file_problem(path: Path, want: DataFile) -> str | None:
    try:
        problem = _problem(path.read_bytes(), want)
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return problem if problem and not _has_rows(path, want) else None


def _has_rows(path: Path, want: DataFile) -> bool:
    """Whether a file that differs in bytes has the same rows, perhaps with other fields, spaces or
    line ends."""
    try:
        rows = [pair[1:] for pair in files.read_pairs(path)]
    except UserError:
        return False
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest() == want.rows_sha256


def _problem(data: bytes, want: DataFile) -> str | None:
    digest = hashlib.sha256(data).hexdigest()
    if digest == want.sha256:
        return None
    return (
        f"not the expected file ({want.bytes:,} bytes, SHA-256 {want.sha256[:16]}...), "
        f"but {len(data):,} bytes, {digest[:16]}..."
    )
