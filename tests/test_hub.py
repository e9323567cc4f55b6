"""hub.py finds the right folder, says in one line what is wrong, and never leaves half a file.

No test reaches the internet. The Hub's client is replaced and raises its real exceptions, its cache
is a folder made here, and downloads come from a server on this machine.
"""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from conftest import slow
from huggingface_hub import constants, errors

from nanogsm import UserError
from nanogsm.store import hub


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """An empty cache, none of the machine's settings, and no host except 127.0.0.1."""
    for name in ("HF_HUB_OFFLINE", "NANOGSM_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NANOGSM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(hub, "DATA_URLS", ["http://127.0.0.1:1/"])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)


def fill(folder: Path, *names: str, **contents) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"{}")
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def model_folder(folder: Path) -> Path:
    return fill(folder, "config.json", "tokenizer.json", "model.safetensors")


def adapter_folder(folder: Path, base) -> Path:
    config = {"base_model_name_or_path": base}
    return fill(folder, "adapter_model.safetensors", adapter_config=config)


def message(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert text and "\n" not in text, "a user's error is one line"
    return text


# ---- local models ----


def test_plain_folder(tmp_path):
    folder = model_folder(tmp_path / "gemma")
    assert hub.find_model(str(folder)) == (folder, None, str(folder))
    # the recorded name must not depend on the folder in which the script was started
    assert hub.find_model("gemma").name == str(folder)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = model_folder(tmp_path / "gemma")
    assert hub.find_model("~/gemma") == (folder, None, str(folder))


def test_a_runs_adapter_wins_over_its_merged_model(tmp_path):
    """The adapter holds the trained weights. Merging rounds them."""
    run, base = tmp_path / "run", model_folder(tmp_path / "base")
    model_folder(run / "model")
    assert hub.find_model(str(run)) == (run / "model", None, str(run / "model"))
    adapter_folder(run / "adapter", str(base))
    assert hub.find_model(str(run)) == (base, run / "adapter", str(base))
    assert hub.find_model(str(run / "model")).adapter is None


def test_adapter_folder_and_its_base(tmp_path, monkeypatch):
    base = model_folder(tmp_path / "sft" / "model")
    adapter = adapter_folder(tmp_path / "adapter-only", str(tmp_path / "sft"))
    assert hub.find_model(str(adapter)) == (base, adapter, str(base))
    # an adapter_config.json decides, even next to a config.json
    fill(adapter, "config.json")
    assert hub.find_model(str(adapter)).adapter == adapter
    # a base on the Hub keeps its Hub id as the name
    snapshot = model_folder(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(snapshot))
    adapter_folder(adapter, "owner/base")
    assert hub.find_model(str(adapter)) == (snapshot, adapter, "owner/base")


def test_a_folder_that_hides_the_hubs_model_of_a_run_is_noticed(tmp_path, monkeypatch):
    """The run was trained on the Hub's owner/base. Later somebody makes a folder of that name."""
    run, snapshot = tmp_path / "run", model_folder(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(snapshot))
    adapter_folder(run / "adapter", "owner/base")
    fill(run, run_args={"info": {"base": str(snapshot)}, "args": {}})
    assert hub.find_model(str(run)) == (snapshot, run / "adapter", "owner/base")
    here = model_folder(tmp_path / "owner" / "base")
    text = message(hub.find_model, str(run))
    assert "owner/base is a folder here" in text and str(snapshot) in text and "--base" in text
    assert hub.find_model(str(run), base=str(here)).base == here


def test_the_fingerprint_of_an_adapter_has_its_scale(tmp_path):
    base = model_folder(tmp_path / "base")
    adapter = adapter_folder(tmp_path / "a", str(base))
    before = hub.fingerprint(hub.find_model(str(adapter)))
    config = {"base_model_name_or_path": str(base), "lora_alpha": 800}
    fill(adapter, adapter_config=config | {"base_model_name_or_path": "./base"})
    assert hub.fingerprint(hub.find_model(str(adapter))) != before
    with_other_name = hub.fingerprint(hub.find_model(str(adapter)))
    fill(adapter, adapter_config=config)
    assert hub.fingerprint(hub.find_model(str(adapter))) == with_other_name  # only spelt otherwise


def test_broken_adapters(tmp_path):
    adapter = adapter_folder(tmp_path / "a", None)
    assert "base_model_name_or_path" in message(hub.find_model, str(adapter))
    adapter_folder(adapter, str(tmp_path / "gone"))
    text = message(hub.find_model, str(adapter))
    assert "no such folder" in text and str(adapter / "adapter_config.json") in text
    adapter_folder(adapter, str(adapter))  # its own base: this must end
    assert "another adapter" in message(hub.find_model, str(adapter))
    adapter_folder(adapter, str(model_folder(tmp_path / "base")))
    (adapter / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in message(hub.find_model, str(adapter))
    assert hub.find_model(str(adapter), weights=False).adapter == adapter
    (adapter / "adapter_config.json").write_text("{")
    assert "cannot read" in message(hub.find_model, str(adapter))


@pytest.mark.parametrize("sign", ["run_args.json", "checkpoint"])
def test_unfinished_run(tmp_path, sign):
    run = fill(tmp_path / "run")
    assert "is not a model" in message(hub.find_model, str(run))
    (run / sign).mkdir()
    if sign == "run_args.json":
        (run / sign).rmdir()
        fill(run, sign)
    assert "training has not finished; run the same training command" in message(
        hub.find_model, str(run)
    )
    fill(run, "summary.json")
    assert "is a finished run whose weights have been deleted" in message(hub.find_model, str(run))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_git_lfs_pointer_is_not_the_file(tmp_path, name):
    """What a clone without Git LFS has in the place of large files."""
    shutil.copytree(hub.EMBEDDED, tmp_path / "m")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 33\n"
    (tmp_path / "m" / name).write_text(pointer)
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer, not the file: run `git lfs"):
        hub.find_model(str(tmp_path / "m"))


@pytest.mark.parametrize("gone", ["tokenizer.json", "model.safetensors"])
def test_incomplete_folder_names_what_is_missing(tmp_path, gone):
    folder = model_folder(tmp_path / "m")
    (folder / gone).unlink()
    assert gone in message(hub.find_model, str(folder))


def test_dry_run_needs_no_weights(tmp_path):
    folder = fill(tmp_path / "m", "config.json", "tokenizer.json")
    assert hub.find_model(str(folder), weights=False).base == folder
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in message(hub.find_model, str(folder), weights=False)


@pytest.mark.parametrize(
    "name", ["", "gemma", "./gemma", "/no/gemma", "~/gemma", "a/b/c", "a/", "/x", "../x", "a/.b"]
)
def test_what_is_no_hub_id_is_never_asked_for(name):
    text = message(hub.find_model, name)  # snapshot_download is None: a call would be a TypeError
    assert "no such folder" in text and "owner/name" in text


def test_a_file_is_not_a_model(tmp_path):
    fill(tmp_path, "model.safetensors")
    assert "is a file" in message(hub.find_model, "model.safetensors")


# ---- weights ----


def shards(folder: Path, weight_map, *names: str) -> Path:
    fill(folder, *names)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_index_says_which_tensors_each_file_holds(tmp_path):
    folder = shards(tmp_path, {"a": "x.safetensors", "b": "y.safetensors", "c": "x.safetensors"},
                    "x.safetensors", "y.safetensors")  # fmt: skip
    assert hub.weight_files(folder) == {
        folder / "x.safetensors": {"a", "c"}, folder / "y.safetensors": {"b"}
    }  # fmt: skip
    fill(folder, "model.safetensors")  # the single file wins, as in transformers
    assert hub.weight_files(folder) == {folder / "model.safetensors": None}


def test_missing_shards_are_named(tmp_path):
    shards(tmp_path, {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"},
           "2.safetensors")  # fmt: skip
    text = message(hub.weight_files, tmp_path)
    assert "1.safetensors, 3.safetensors" in text and "2.safetensors" not in text


@pytest.mark.parametrize(
    "target", ["../x.safetensors", "/abs.safetensors", "sub/x.safetensors", "..", "x.bin", "",
               "a\\b.safetensors", "x.safetensors\n", ".safetensors", 3, None, ["x.safetensors"]]
)  # fmt: skip
def test_index_cannot_point_elsewhere(tmp_path, target):
    folder = shards(tmp_path / "m", {"a": target}, "x.safetensors", "x.bin")
    fill(folder / "sub", "x.safetensors")
    fill(tmp_path, "x.safetensors")
    assert "plain name" in message(hub.weight_files, folder)


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"weight_map": []}', '{"weight_map": {}}',
                                  "\xff", "[" * 100_000])  # fmt: skip
def test_broken_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin1"))
    assert "index.json" in message(hub.weight_files, tmp_path)


def test_pickle_and_gguf_are_no_weights(tmp_path):
    fill(tmp_path, "pytorch_model.bin", "gemma.gguf")
    assert "no safetensors weights" in message(hub.weight_files, tmp_path)


def test_link_out_of_the_folder_is_refused(tmp_path):
    fill(tmp_path, "secret.safetensors")
    folder = fill(tmp_path / "m")
    (folder / "model.safetensors").symlink_to("../secret.safetensors")
    assert "out of its folder" in message(hub.weight_files, folder)
    (tmp_path / "secret.safetensors").unlink()
    assert "missing: model.safetensors" in message(hub.weight_files, folder)


def hf_cache(cache: Path, repo: str = "owner/name") -> Path:
    """A cache as huggingface_hub 2.4 makes it. Returns the snapshot's folder."""
    root = cache / f"models--{repo.replace('/', '--')}"
    fill(root / "blobs", "c", "t")
    fill(cache / "blobs" / "ab", "shared")
    (root / "blobs" / "w").symlink_to("../../blobs/ab/shared")
    snapshot = fill(root / "snapshots" / ("0" * 40))
    for name, blob in {"config.json": "c", "tokenizer.json": "t", "model.safetensors": "w"}.items():
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    fill(root / "refs")
    (root / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_hub_cache_links_are_followed_but_only_within_the_cache(tmp_path):
    snapshot = hf_cache(tmp_path / "hf")
    shard = snapshot / "model.safetensors"
    assert hub.weight_files(snapshot) == {shard: None}  # through the store all repositories share
    for target in ("../../blobs/c", "../../../blobs/ab/shared"):
        shard.unlink()
        shard.symlink_to(target)
        assert hub.weight_files(snapshot) == {shard: None}
    other = hf_cache(tmp_path / "hf", "other/repo").parents[1] / "blobs" / "c"
    for target in (fill(tmp_path, "secret") / "secret", other):
        shard.unlink()
        shard.symlink_to(target)
        assert "out of its folder" in message(hub.weight_files, snapshot)


@pytest.mark.parametrize("place", ["name/snapshots/0", "models--name/other/0"])
def test_only_the_caches_own_layout_may_link_to_blobs(tmp_path, place):
    folder = fill(tmp_path / place)
    fill(folder.parents[1] / "blobs", "w")
    (folder / "model.safetensors").symlink_to("../../blobs/w")
    assert "out of its folder" in message(hub.weight_files, folder)


# ---- the Hub ----


def answer(kind, status: int):
    """An error of the Hub's client that comes with a response."""
    return kind("text\nof the client", response=SimpleNamespace(
        status_code=status, headers={}, request=None))  # fmt: skip


def caused_by(error: Exception, cause: Exception | None) -> Exception:
    error.__cause__ = cause
    return error


NOT_HERE = errors.LocalEntryNotFoundError
PARTIAL = errors.IncompleteSnapshotError("missing", snapshot_path="x")


@pytest.mark.parametrize(
    "error, parts",
    [
        (answer(errors.GatedRepoError, 403), ["gated", "https://huggingface.co/owner/name",
         "hf auth login", "HF_TOKEN", "local folder"]),
        (answer(errors.RepositoryNotFoundError, 404), ["no such folder", "spelling", "HF_TOKEN"]),
        (NOT_HERE("not cached"), ["no network", "a local folder"]),
        (caused_by(NOT_HERE("x"), answer(errors.HfHubHTTPError, 503)), ["(503)", "later"]),
        (answer(errors.HfHubHTTPError, 429), ["(429)", "wait"]),
        (answer(errors.HfHubHTTPError, 401), ["(401)", "hf auth login"]),
        (errors.HTTPError("connect"), ["no network"]),
        (ConnectionResetError("reset"), ["no network"]),
        (OSError(errno.ENOSPC, "voll"), ["disk full", "HF_HOME"]),
        (RuntimeError("Data error: No space left on device (os error 28)"), ["disk full"]),
        (PermissionError(errno.EACCES, "Permission denied"), ["download failed", "Permission"]),
        (errors.HFValidationError("bad id"), ["download failed", "bad id"]),
    ],
)  # fmt: skip
def test_hub_errors_in_one_line(monkeypatch, error, parts):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raiser(error))
    text = message(hub.find_model, "owner/name")
    assert text.startswith("owner/name: ") and all(part in text for part in parts), text
    if not isinstance(error, errors.GatedRepoError):
        assert "gated" not in text


def raiser(error):
    def snapshot_download(repo, *, local_files_only=False, **kwargs):
        raise NOT_HERE("cached: nothing") if local_files_only and not hub._offline() else error

    return snapshot_download


@pytest.mark.parametrize("error, part", [(NOT_HERE("x"), "not in"), (PARTIAL, "only part")])
def test_offline_errors(monkeypatch, error, part):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raiser(error))
    text = message(hub.find_model, "owner/name")
    assert part in text and "unset HF_HUB_OFFLINE" in text


def test_offline_setting_reaches_the_client(tmp_path, monkeypatch):
    # the client reads the variable only when it is imported; a notebook may set it later
    folder, asked = model_folder(tmp_path / "m"), []

    def snapshot_download(repo, *, local_files_only, **kwargs):
        asked.append(local_files_only)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for value in ("", "0", "1", "true"):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        hub.find_model("owner/name")
    assert asked == [False] * 4 + [True] * 4  # each time: which kind it is, then its files


def test_circle_of_causes_ends():
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    assert hub._hub_problem("owner/name", first) == "owner/name: the download failed: first"


def test_our_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raiser(TypeError("ours")))
    with pytest.raises(TypeError):
        hub.find_model("owner/name")


def test_only_the_files_needed_are_asked_for(tmp_path, monkeypatch):
    from fnmatch import fnmatch

    folder, asked = model_folder(tmp_path / "m"), []

    def snapshot_download(repo, *, allow_patterns, **kwargs):
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.find_model("owner/name") == (folder, None, "owner/name")
    hub.find_model("owner/name", weights=False)
    assert asked[0] == asked[2] == ["config.json", "adapter_config.json"]  # which kind it is
    asked = asked[1::2]
    index, shard = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
    for names, both in [
        (["config.json", "tokenizer.json", "tokenizer_config.json"], [1, 1]),
        (["generation_config.json", "chat_template.jinja"], [1, 1]),
        ([index, shard, "model.safetensors"], [1, 0]),
        (["pytorch_model.bin", "gemma-2b-it.gguf", "training_args.bin"], [0, 0]),
    ]:
        for name in names:
            assert [any(fnmatch(name, p) for p in patterns) for patterns in asked] == both, name


def test_repository_without_safetensors(tmp_path, monkeypatch):
    folder = fill(tmp_path / "m", "config.json", "tokenizer.json")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    text = message(hub.find_model, "owner/name")
    assert text.startswith("owner/name: ") and "no safetensors weights" in text


def test_cached_model_is_found_without_network(tmp_path, monkeypatch):
    monkeypatch.undo()  # the real client on a cache in its layout
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = hf_cache(tmp_path / "hf")
    assert hub.find_model("owner/name") == (snapshot, None, "owner/name")
    (snapshot / "model.safetensors").unlink()
    assert "HF_HUB_OFFLINE" in message(hub.find_model, "owner/name")
    assert "not in the Hub's cache" in message(hub.find_model, "owner/other")


def test_cached_model_is_used_when_the_hub_fails(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "m")

    def snapshot_download(repo, *, local_files_only=False, **kwargs):
        if not local_files_only:
            raise errors.HTTPError("proxy")  # the client itself has no fallback for this
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.find_model("owner/name").base == folder
    (folder / "model.safetensors").unlink()  # a partial copy does not count
    assert "no network" in message(hub.find_model, "owner/name")


# ---- adapters on the Hub ----

BASE = {name: b"{}" for name in ("config.json", "tokenizer.json", "model.safetensors")}
JUNK = {"README.md": b"", "training_args.bin": b"", "optimizer.pt": b"", "tokenizer.json": b"{}"}


def on_hub(base: str, **config) -> dict[str, bytes]:
    """The files of an adapter's repository, as PEFT's push_to_hub and a Trainer leave them."""
    config = {"peft_type": "LORA", "base_model_name_or_path": base} | config
    files = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": b"A"}
    return files | JUNK


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


@contextmanager
def serve_hub(repos: dict[str, dict[str, dict[str, bytes]]]):
    """A server that speaks as much of the Hub's protocol as its real client needs. repos: {name:
    {revision: {file: content}}}. Yields (address, list of the files that were fetched)."""
    fetched = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.partition("?")[0]
            for repo, revisions in repos.items():
                for revision, content in revisions.items():
                    commit = commit_of(revision)
                    for name in (revision, commit):
                        if path == f"/api/models/{repo}/revision/{name}":
                            return self.json({"id": repo, "sha": commit, "siblings": []})
                        if path == f"/api/models/{repo}/tree/{name}":
                            sizes = [(f, len(c)) for f, c in content.items()]
                            return self.json([
                                {"type": "file", "path": f, "size": n, "oid": f} for f, n in sizes
                            ])  # fmt: skip
                        for file, data in content.items():
                            if path == f"/{repo}/resolve/{name}/{file}":
                                if self.command == "GET":
                                    fetched.append(f"{repo}@{revision}/{file}")
                                return self.reply(data, commit, file)
                if path.startswith(f"/api/models/{repo}/revision/"):
                    return self.json({"error": "x"}, 404, "RevisionNotFound")
            self.json({"error": "x"}, 404, "RepoNotFound")

        def json(self, content, status=200, error=""):
            self.reply(json.dumps(content).encode(), "", "", status, error)

        def reply(self, data, commit, etag, status=200, error=""):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Type", "application/json")
            for key, value in [("X-Repo-Commit", commit), ("ETag", etag), ("X-Error-Code", error)]:
                if value:
                    self.send_header(key, f'"{value}"' if key == "ETag" else value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()


def ask(home: Path, server: str, *names: str, **settings) -> list[str]:
    """find_model of each name, in a process of its own: the client reads its settings once."""
    code = (
        "import sys; from nanogsm import UserError; from nanogsm.store import hub\n"
        "for name in sys.argv[1:]:\n"
        "    name, _, base = name.partition('+')\n"
        "    try: found = hub.find_model(name, base=base or None)\n"
        "    except UserError as error: print('ERROR', error)\n"
        "    else: print(found.base, found.adapter, found.name)"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_HOME": str(home / "hf"), "HF_ENDPOINT": server, "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]), **settings}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=home, env=env, timeout=120,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@slow
def test_an_adapter_on_the_hub_is_a_model_like_any_other(tmp_path):
    """With the Hub's real client: what is fetched, which revision, what the cache is good for, and
    that a stranger's file never names something on this disk."""
    model_folder(tmp_path / "owner/base")  # hides the Hub's model from the user, not from adapters
    model_folder(tmp_path / "mine")
    repos = {
        "owner/base": {"main": BASE, "v1.5": BASE},
        "some/adapter": {"main": on_hub("owner/base"), "old": on_hub("owner/base")},
        "pinned/adapter": {"main": on_hub("owner/base", revision="v1.5")},
        "both/kinds": {"main": on_hub("owner/base") | BASE},
        "local/base": {"main": on_hub(str(tmp_path / "mine"))},
        "tiny/base": {"main": on_hub("tiny")},
        "evil/revision": {"main": on_hub("owner/base", revision="../../x")},
        "second/adapter": {"main": on_hub("some/adapter")},
        "its/own": {"main": on_hub("its/own")},
        "no/weights": {"main": {"adapter_config.json": on_hub("owner/base")["adapter_config.json"],
                                "adapter_model.bin": b""}},
    }  # fmt: skip
    with serve_hub(repos) as (server, fetched):
        main, pinned, old, both, absent, *bad = ask(
            tmp_path, server, "some/adapter", "pinned/adapter", "some/adapter@old", "both/kinds",
            "some/adapter@gone", "local/base", "tiny/base", "evil/revision", "second/adapter",
            "its/own", "no/weights",
        )  # fmt: skip
        chosen = ask(tmp_path, server, "tiny/base+tiny", f"local/base+{tmp_path}/mine",
                     "owner/base+tiny", "some/adapter+some/adapter")  # fmt: skip
    cache = tmp_path / "hf/hub"

    def snapshot(repo: str, revision: str = "main") -> str:
        return f"{cache}/models--{repo.replace('/', '--')}/snapshots/{commit_of(revision)}"

    base = snapshot("owner/base")
    assert main == f"{base} {snapshot('some/adapter')} owner/base"
    assert pinned == (f"{snapshot('owner/base', 'v1.5')} {snapshot('pinned/adapter')} "
                      "owner/base@v1.5")  # fmt: skip
    assert old == f"{base} {snapshot('some/adapter', 'old')} owner/base"
    assert both == f"{base} {snapshot('both/kinds')} owner/base"
    adapters = {file for file in fetched if "owner/base" not in file}
    # (config.json is what a plain model is known by, and it is small)
    assert {file.split("/")[-1] for file in adapters} == {
        "adapter_config.json", "adapter_model.safetensors", "config.json"
    }, adapters  # fmt: skip
    assert absent.startswith("ERROR some/adapter: it has no such revision")
    for answer, says in zip(
        bad,
        ["--base", "--base", "not a branch", "another", "another adapter, its/own", "no adapter_m"],
    ):
        assert answer.startswith("ERROR") and says in answer, answer
    embedded = f"{hub.EMBEDDED} {snapshot('tiny/base')} tiny"
    mine = f"{tmp_path}/mine {snapshot('local/base')} {tmp_path}/mine"
    assert chosen[:2] == [embedded, mine]
    assert "is a whole model" in chosen[2] and "another adapter" in chosen[3]

    # The server is gone. What was fetched is found, offline or not, and nothing else is.
    names = ("some/adapter", "pinned/adapter", "owner/other")
    for settings in ({"HF_HUB_OFFLINE": "1"}, {}):
        again = ask(tmp_path, server, *names, **settings)
        assert again[:2] == [main, pinned] and again[2].startswith("ERROR owner/other: "), again


def test_an_adapter_on_this_disk_may_name_a_revision_of_its_base(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo, *, revision, **kwargs):
        asked.append((repo, revision))
        return str(model_folder(tmp_path / "m"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    adapter = adapter_folder(tmp_path / "a", "owner/base")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "owner/base", "revision": "v2"})
    )
    assert hub.find_model(str(adapter)).name == "owner/base@v2"
    assert asked == [("owner/base", "v2"), ("owner/base", "m")]  # m: the snapshot's own name
    assert hub.find_model(str(adapter), base="tiny").name == "tiny"
    model_folder(tmp_path / "owner" / "base")  # a local folder has no revisions
    assert hub.find_model(str(adapter)).name == str(tmp_path / "owner" / "base")


def test_import_leaves_huggingface_hub_alone():
    code = "import sys, nanogsm.store.hub; sys.exit('huggingface_hub' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


# ---- data ----

CONTENT = b'{"question": "q", "answer": "#### 1"}\n' * 5000


@contextmanager
def server(reply):
    """A server on this machine. reply(handler) answers each GET. Yields (url, requested paths)."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            try:
                reply(self)
            except OSError:
                pass  # the client went away

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads, http.block_on_close = True, False
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/", asked
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def sends(content: bytes, status: int = 200):
    def reply(handler):
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(content)

    return reply


@pytest.fixture
def small_file(monkeypatch):
    """train.jsonl is CONTENT for this test."""
    entry = hub.DataFile(len(CONTENT), 5000, hashlib.sha256(CONTENT).hexdigest(), None)
    monkeypatch.setitem(hub.DATA_FILES, "train.jsonl", entry)
    return entry


def test_data_files_table():
    """Sizes and rows of the published files, and the first digits of their digests."""
    table = {name: (f.bytes, f.rows, f.sha256[:8]) for name, f in hub.DATA_FILES.items()}
    assert table == {
        "train.jsonl": (4166206, 7473, "17f347dc"),
        "test.jsonl": (749738, 1319, "3730d312"),
        "train_socratic.jsonl": (5401739, 7473, "153d8655"),
        "test_socratic.jsonl": (972978, 1319, "c9667336"),
        "math_train.jsonl": (6466173, 7500, "2183510c"),
        "math_test.jsonl": (4101364, 5000, "3371949f"),
        "math500.jsonl": (446564, 500, "35dc4108"),
        "phase1_train.jsonl": (7900236, 0, "e9da6a73"),  # rows not counted: it was not read here
    }
    assert all(len(bytes.fromhex(f.sha256)) == 32 for f in hub.DATA_FILES.values())


def test_download_is_pinned_to_a_commit():
    code = "from nanogsm.store import hub; print(hub.DATA_URLS[0])"
    root = Path(__file__).parents[1]
    url = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert url.stdout.strip() == (
        "https://raw.githubusercontent.com/openai/grade-school-math/"
        "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/"
    )


def test_data_dir_is_used_as_it_is(tmp_path, small_file):
    (tmp_path / "train.jsonl").write_bytes(CONTENT)
    assert hub.data_file("train.jsonl", tmp_path) == tmp_path / "train.jsonl"
    assert not (tmp_path / "cache").exists()


def test_a_data_file_written_otherwise_is_taken_if_its_rows_are_the_same(tmp_path, monkeypatch):
    rows = [["2 + 3?", "5\n#### 5"], ["Tea é?", "#### 1"]]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    monkeypatch.setitem(hub.DATA_FILES, "train.jsonl", hub.DataFile(9, 2, "0" * 64, digest))

    def write(*rows, end="\n", **options):
        lines = [json.dumps(row, **options) for row in rows]
        (tmp_path / "train.jsonl").write_bytes((end.join(lines) + end).encode())

    row = {"id": 7, "answer": rows[0][1] + " ", "question": " " + rows[0][0]}
    other = dict(zip(("question", "answer"), rows[1]))
    write(row, other, end="\r\n", ensure_ascii=False, indent=None)
    assert hub.data_file("train.jsonl", tmp_path) == tmp_path / "train.jsonl"
    for wrong in ([other, row], [row], [row, other, other], [row, other | {"answer": "#### 2"}]):
        write(*wrong)
        said = message(hub.data_file, "train.jsonl", tmp_path)
        assert "not the expected file" in said and "--data FILE.jsonl" in said


def test_data_dir_never_falls_through(tmp_path, small_file, monkeypatch):
    with server(sends(CONTENT)) as (url, asked):
        monkeypatch.setattr(hub, "DATA_URLS", [url])
        text = message(hub.data_file, "train.jsonl", tmp_path)
        assert str(tmp_path / "train.jsonl") in text and "no such file" in text
        (tmp_path / "train.jsonl").write_bytes(CONTENT[:-1])
        text = message(hub.data_file, "train.jsonl", str(tmp_path))
    found = hashlib.sha256(CONTENT[:-1]).hexdigest()
    for part in (f"{len(CONTENT):,} bytes", f"{len(CONTENT) - 1:,} bytes", found[:16],
                 small_file.sha256[:16], f"{url}train.jsonl", "--data-dir"):  # fmt: skip
        assert part in text, part
    assert asked == []


def test_download_once_then_cache(tmp_path, small_file, monkeypatch):
    with server(sends(CONTENT)) as (url, asked):
        monkeypatch.setattr(hub, "DATA_URLS", [url])
        path = hub.data_file("train.jsonl", "")  # an empty NANOGSM_DATA_DIR counts as unset
        assert path == tmp_path / "cache" / "train.jsonl" and path.read_bytes() == CONTENT
        assert hub.data_file("train.jsonl") == path
        assert asked == ["/train.jsonl"]
        path.write_bytes(b"spoilt")
        assert hub.data_file("train.jsonl").read_bytes() == CONTENT
    assert os.listdir(path.parent) == ["train.jsonl"]


def test_cache_folder_order(tmp_path, monkeypatch):
    assert hub.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("NANOGSM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.cache_folder() == tmp_path / "xdg" / "nanogsm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.cache_folder() == tmp_path / ".cache" / "nanogsm"


@pytest.mark.parametrize(
    "wrong",
    [sends(CONTENT[:-9]), sends(CONTENT + b"x"), sends(CONTENT[::-1]), sends(b"", 404)],
    ids=["short", "long", "same length", "404"],
)
def test_wrong_bytes_are_refused_and_the_next_source_asked(
    tmp_path, small_file, monkeypatch, wrong
):
    with server(wrong) as (bad, _), server(sends(CONTENT)) as (good, _):
        monkeypatch.setattr(hub, "DATA_URLS", [bad])
        text = message(hub.data_file, "train.jsonl")
        for part in (f"{bad}train.jsonl", str(tmp_path / "cache"), "--data-dir", "127.0.0.1"):
            assert part in text
        assert not list(tmp_path.rglob("*.jsonl*")), "a partial file was left"
        monkeypatch.setattr(hub, "DATA_URLS", [bad, good])
        assert hub.data_file("train.jsonl").read_bytes() == CONTENT


def test_endless_answer_is_cut_off(small_file, monkeypatch):
    def reply(handler):
        sends(b"")(handler)
        while True:
            handler.wfile.write(CONTENT)

    with server(reply) as (url, _):
        monkeypatch.setattr(hub, "DATA_URLS", [url])
        assert "not the expected file" in message(hub.data_file, "train.jsonl")


def test_stalled_server_ends(small_file, monkeypatch):
    leave = threading.Event()

    def reply(handler):
        sends(CONTENT[:100])(handler)
        handler.wfile.flush()
        leave.wait(5)

    monkeypatch.setattr(hub, "READ_TIMEOUT", 0.1)
    with server(reply) as (url, _):
        monkeypatch.setattr(hub, "DATA_URLS", [url])
        text = message(hub.data_file, "train.jsonl")
        assert not leave.is_set() and "timed out" in text
        leave.set()


def test_trickling_server_ends(small_file, monkeypatch):
    leave = threading.Event()

    def reply(handler):
        sends(b"")(handler)
        while not leave.wait(0.02):  # never silent for long, so only the total limit ends it
            handler.wfile.write(b"x")

    monkeypatch.setattr(hub, "DOWNLOAD_TIMEOUT", 0.2)
    with server(reply) as (url, _):
        monkeypatch.setattr(hub, "DATA_URLS", [url])
        text = message(hub.data_file, "train.jsonl")
        leave.set()
    assert "not finished" in text


def test_offline_asks_nobody(tmp_path, small_file, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with server(sends(CONTENT)) as (url, asked):
        monkeypatch.setattr(hub, "DATA_URLS", [url])
        assert "HF_HUB_OFFLINE" in message(hub.data_file, "train.jsonl")
    assert asked == []


def test_two_downloads_at_once_give_one_whole_file(tmp_path, small_file, monkeypatch):
    together, results = threading.Barrier(2), []

    def reply(handler):
        together.wait(5)  # both ask before either gets an answer
        sends(CONTENT)(handler)

    with server(reply) as (url, asked):
        monkeypatch.setattr(hub, "DATA_URLS", [url])
        threads = [threading.Thread(target=lambda: results.append(hub.data_file("train.jsonl")))
                   for _ in range(2)]  # fmt: skip
        [t.start() for t in threads]
        [t.join() for t in threads]
    path = tmp_path / "cache" / "train.jsonl"
    assert results == [path, path] and len(asked) == 2 and path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == ["train.jsonl"]


def test_full_disk_is_said_and_leaves_nothing(tmp_path, small_file, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with server(sends(CONTENT)) as (url, _):
        monkeypatch.setattr(hub, "DATA_URLS", [url])
        text = message(hub.data_file, "train.jsonl")
    assert "No space left" in text and "NANOGSM_CACHE" in text
    assert os.listdir(tmp_path / "cache") == []
