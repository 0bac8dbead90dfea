"""The cache: what has a name of its own, one process at a time, damage and kills that nobody believes."""

import functools
import importlib
import os
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from condexp import cache
from condexp.cache import Checkpoint, cached, config_hash, load_tensors, save_tensors

STORE = {
    "save": lambda path, value: save_tensors(path, {"x": torch.ones(64)}, {"value": value}),
    "load": lambda path: load_tensors(path)[1]["value"],
}
WORKER = """
    import os, sys, time
    from pathlib import Path
    from condexp.cache import cached, load_tensors, save_tensors

    def compute(checkpoint):
        print("computing", flush=True)
        first = (checkpoint.load() or {"step": 0})["step"]
        for step in range(first, 20):
            checkpoint.save({"step": step})
            time.sleep(float(sys.argv[1]) / 20)
        return f"{os.getpid()} from {first}"

    def save(path, value):
        save_tensors(path, {}, {"value": value})

    print("got", cached("slow", {"n": 1}, compute, save, lambda path: load_tensors(path)[1]["value"]))
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    "An empty cache."
    monkeypatch.setenv("CONDEXP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def worker(root, tmp_path):
    "Starts a process that asks for an entry that takes some seconds to make."

    def start(seconds):
        (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, tmp_path / "worker.py", str(seconds)], env=dict(os.environ), **pipes)

    return start


def ask():
    "An entry, and how often it had to be made."
    calls = []

    def compute(checkpoint):
        calls.append(checkpoint.load())
        return 7

    return cached("numbers", {"n": 1}, compute, **STORE), len(calls)


def files(root):
    return sorted(p for p in root.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_two_processes_make_one_entry_once_and_get_the_same(worker, root):
    outputs = [p.communicate(timeout=120) for p in [worker(4.5), worker(4.5)]]
    told = [out for out, _ in outputs]
    assert sum("computing" in out for out in told) == 1 and len({out.split("got ")[1] for out in told}) == 1
    assert sum("waiting for another process" in err for _, err in outputs) == 1
    assert not any(str(root) in err for _, err in outputs)
    assert [p.suffix for p in files(root)] == [".safetensors"]


def test_killed_it_leaves_nothing_that_is_believed_and_the_next_goes_on(worker, root):
    first = worker(20)
    deadline = time.monotonic() + 60
    while not list(root.glob("slow/*.checkpoint")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1.2)
    first.kill()
    first.communicate()
    (state,) = root.glob("slow/*.checkpoint")
    torn = state.with_name(f".{state.stem}.safetensors.0a1b2c3d.tmp")  # as if it had been killed while writing
    torn.write_text("half")
    again, err = worker(0.2).communicate(timeout=120)
    assert "got" in again and "from 0" not in again, err
    assert files(root) == [state.with_suffix(".safetensors")]


def flip(path):
    content = bytearray(path.read_bytes())
    content[content.rindex(b"\x80\x3f")] ^= 1  # in a number that is 1
    path.write_bytes(content)


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_named_and_made_again(damage, root):
    assert ask() == (7, 1) and ask() == (7, 0)
    (entry,) = files(root)
    damage(entry)
    with pytest.raises(ValueError, match="damaged"):
        load_tensors(entry)
    with pytest.warns(UserWarning, match=f"{entry.name} .*made again"):
        assert ask() == (7, 1)
    with warnings.catch_warnings(action="error"):
        assert ask() == (7, 0)


def test_of_an_entry_of_two_files_both_are_looked_at(root):
    second = lambda path: path.with_suffix(".second.safetensors")
    calls = []

    def save(path, value):
        save_tensors(second(path), {"x": torch.ones(9)}, {})
        save_tensors(path, {}, {"value": value})

    def load(path):
        return load_tensors(second(path))[1], load_tensors(path)[1]

    def compute(checkpoint):
        calls.append(0)
        return 1

    cached("pairs", {}, compute, save, load)
    for harm in (flip, os.unlink):
        (path,) = root.glob("pairs/*.second.safetensors")
        harm(path)
        with pytest.warns(UserWarning, match="second"):
            cached("pairs", {}, compute, save, load)
    assert len(calls) == 3


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_not_gone_on_from(damage, tmp_path):
    checkpoint = Checkpoint(tmp_path / "a.checkpoint")
    checkpoint.save({"value": torch.ones(300), "notes": ["x", 1.5]})
    assert checkpoint.load()["notes"] == ["x", 1.5]
    damage(checkpoint.path)
    with pytest.warns(UserWarning, match="a.checkpoint is damaged"):
        assert checkpoint.load() is None
    assert not checkpoint.path.exists()


def test_no_flipped_bit_of_a_file_changes_what_is_read(tmp_path):
    path = save_tensors(tmp_path / "a.safetensors", {"x": torch.arange(9.0)}, {"classes": ["a", "b"]})
    content = path.read_bytes()
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :])
        try:
            tensors, meta = load_tensors(path)
        except ValueError:
            continue
        assert meta == {"classes": ["a", "b"]} and torch.equal(tensors["x"], torch.arange(9.0)), i


def test_files_without_a_checksum_are_still_read(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "old.safetensors", metadata={"condexp": '{"a": 1}'})
    assert load_tensors(tmp_path / "old.safetensors")[1] == {"a": 1}


def test_a_cache_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONDEXP_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="^CONDEXP_CACHE is .*file', but it must be a folder"):
        cached("numbers", {}, lambda checkpoint: pytest.fail("it was computed"), **STORE)


def test_leftovers_of_the_killed_are_swept_when_their_entry_is_asked_for(root):
    ask()
    (entry,) = files(root)
    entry.with_name(f".{entry.name}.deadbeef.tmp").write_text("half")
    Checkpoint(entry.with_suffix(".checkpoint")).save({"value": 8})
    assert ask() == (7, 0) and files(root) == [entry]


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("CONDEXP_CACHE", str(tmp_path))
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user whom the system does not know
    assert cache.cache_dir() == tmp_path
    monkeypatch.setenv("CONDEXP_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    if sys.platform == "linux":
        with pytest.raises(ValueError, match="CONDEXP_CACHE .* no home folder"):
            cache.cache_dir()
    monkeypatch.undo()
    monkeypatch.delenv("CONDEXP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.cache_dir().is_absolute() and "condexp" in cache.cache_dir().parts


def test_a_module_counts_by_its_code_and_that_of_what_it_imports(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "somepackage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "cache.py").write_text("")

    def code(a="from . import cache\nfrom .b import f", b="def f(x): return x + 1", other=""):
        for name, text in {"a": a, "b": b, "other": other}.items():
            (package / f"{name}.py").write_text(text)
        cache.code_hash.cache_clear()
        return cache.code_hash("somepackage.a")

    first = code()
    assert first == code(b="def f(x):\n    'One more.'\n    return x + 1  # a comment") == code(other="X = 1")
    assert first != code(b="def f(x): return x + 2") and first != code(a="from .b import f\nX = 1")
    (package / "cache.py").write_text("X = 1")
    assert first == code()
    cache.code_hash.cache_clear()


def test_changed_code_of_the_library_does_not_find_what_the_old_made(root, monkeypatch):
    compute = lambda checkpoint: 5
    compute.__module__ = "condexp.data"
    assert cached("numbers", {}, compute, **STORE) == 5 and len(files(root)) == 1
    monkeypatch.setattr(cache, "code_hash", lambda module: "changed")
    cached("numbers", {}, compute, **STORE)
    assert len(files(root)) == 2


@dataclass(frozen=True)
class Weights:
    bn: float = 1.0
    loss: object = torch.nn.functional.mse_loss


class Scaled:
    def __init__(self, by):
        self.by = by


def squared(x):
    return x**2


def test_configurations_of_all_kinds_have_names_of_their_own():
    configs = [
        Weights(), Weights(bn=2.0), Weights(loss=torch.relu), Weights(loss=squared), Scaled(1), Scaled(2), Scaled, squared,
        functools.partial(squared, x=2), functools.partial(squared, x=3), lambda x: x, torch.nn.ReLU(), torch.nn.Tanh(),
        torch.nn.Sequential(torch.nn.ReLU()), torch.nn.Sequential(torch.nn.Tanh()), torch.float32, torch.device("cpu"),
        (1, 2), None, True, "a",
    ]  # fmt: skip
    names = [config_hash({"it": config}) for config in configs]
    assert len(set(names)) == len(names) and names == [config_hash({"it": config}) for config in configs]


@pytest.mark.parametrize(
    "value", [torch.ones(1), torch.nn.Linear(1, 1), {1, 2}, [object()]], ids=lambda v: type(v).__name__
)
def test_what_has_no_fixed_content_is_no_part_of_a_key(value):
    with pytest.raises(TypeError, match="cache key"):
        config_hash({"it": value})


def test_a_function_that_reads_variables_around_it_is_refused():
    factor = 3
    with pytest.raises(ValueError, match="functools.partial"):
        config_hash({"it": lambda x: factor * x})


def test_a_variable_of_the_same_name_elsewhere_does_not_change_a_function_s_name(tmp_path, monkeypatch):
    "As in a notebook, where a loop's variable may be called like an argument of a function around another."
    code = "name = 'first'\ndef outer(name):\n    def inner(): return name\n    return inner\ndef reads(): return name\n"
    (tmp_path / "like_a_notebook.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("like_a_notebook")
    names = lambda: [cache.source_hash(function) for function in (module.outer("x"), module.reads)]
    (inner, reads), module.name = names(), "second"
    assert names()[0] == inner and names()[1] != reads


def test_saving_takes_no_more_than_its_share(tmp_path, monkeypatch):
    clock, saved = iter(range(1000)), []  # a second passes between two looks at it
    monkeypatch.setattr(cache, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(cache, "write_atomic", lambda path, write: saved.append(path))
    checkpoint = Checkpoint(tmp_path / "slow.checkpoint")
    for _ in range(60):
        checkpoint.save({}, every=0.05)
    assert len(saved) == 4  # a second each, of about 64
    checkpoint.save({})
    assert len(saved) == 5
