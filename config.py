"""Settings, mistakes, files, threads and worker processes, the same way for every script.

A script declares its settings as a dataclass; `load_settings` fills it from an optional YAML file
and `key=value` (or `--key value`) words, later ones winning:
`python train.py configs/nano.yaml steps=100 --out runs/a`.
"""
import concurrent.futures
import csv
import ctypes
import dataclasses
import difflib
import inspect
import json
import multiprocessing
import os
import sys
import threading
from pathlib import Path

import yaml


class InputError(ValueError):
    """A mistake in what the user gave. Its text is one line: what is wrong, where, what to do."""


def read_text(path):
    """A text file's content: UTF-8, with or without a byte order mark.
    Raises InputError if it cannot be read as that."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: is not UTF-8 text (byte {e.start}); save it as UTF-8") from e


def read_json(path, what):
    """The content of a JSON file. Raises InputError if it cannot be read or is none; `what` says
    what it should be."""
    if not Path(path).exists():
        raise InputError(f"{path}: there is no such file; {what}")
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as e:
        raise InputError(f"{path}: not valid JSON ({e}); {what}") from e


def make_folder(path):
    """Makes a folder, and those above it, where they are not there. Raises InputError if it
    cannot."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{path}: no such folder can be made ({e.strerror}); give another "
                         "place") from e


def write_atomically(path, write):
    """`write(temporary path)`, then rename: the file appears under `path` whole or not at all,
    even if killed."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # two processes may write the same
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # of a write that failed


def write_json(path, content, indent=None):
    write_atomically(path, lambda new: new.write_text(json.dumps(content, indent=indent)))


def write_csv(path, columns, rows):
    """Rows, a list of dicts, as CSV; what is not among the columns is left out."""
    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    write_atomically(path, write)


def count_cores():
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def use_threads(threads=1):
    """Torch's threads in this process, unless the user has set OMP_NUM_THREADS.

    One is the default: threads wait for each other at every operation, thousands of times a second
    in models this small, so that one other busy process on the machine stops all of them.
    0: the cores less the machine's load, at least one, which training profits from.
    Measured on two cores, frames/s with 1 and 2 threads: generation 123 and 131, beside a busy
    process 132 and 35; training 1427 and 2331, beside a busy process 1333 and 770.
    """
    import torch
    if "OMP_NUM_THREADS" in os.environ:
        return
    if threads == 0:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0  # Windows has none
        threads = max(1, count_cores() - round(load))
    torch.set_num_threads(threads)


def keep_memory():
    """Have the C library keep what this process frees, for the process's next step.

    A training step on a CPU asks again for what the one before has freed. glibc gives large pieces
    back to the kernel, which has to clear every page of them anew: a fifth of a step's time. With
    another C library nothing changes.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no piece is mapped, and unmapped, by itself
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


def most_memory(children=False):
    """Bytes that this process has held at most, or the largest of those that it has waited for. Not
    on Windows, which lacks Python's module for it."""
    import resource
    who = resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(who).ru_maxrss * unit


def over_cores(function, work, workers=0):
    """function(x) for every x of the list `work`, in order, over `workers` processes of one thread
    each (0: all cores). Yields the results. Raises InputError where a process was ended from
    outside."""
    workers = min(workers or count_cores(), len(work))
    if workers < 2:
        yield from map(function, work)
        return
    # spawn, since a process forked after torch has run threads may hang
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"),
                                                _start_worker) as pool:
        try:
            yield from pool.map(function, work, chunksize=2 if len(work) > 50 else 1)
        except concurrent.futures.BrokenExecutor as e:
            raise InputError("a worker process was ended from outside (out of memory?); give the "
                             "same command again, perhaps with fewer processes: what is finished "
                             "is kept") from e
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker():
    """One thread per process, which ends with its parent."""
    import torch
    torch.set_num_threads(1)
    end_with_parent()


def end_with_parent():
    """Has this process end with the one that started it, even if that is killed."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


def brief(error, most=150):
    """An exception of a library as a part of one line, of `most` characters; its class where it
    says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def hub_problem(error):
    """Why the hub gave nothing, and what to do, as the end of an InputError's line. Libraries wrap
    the cause in errors of their own, so the whole chain is looked through."""
    from huggingface_hub import errors
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        if inner in chain:
            break
        chain.append(inner)

    def found(*kinds):
        return any(isinstance(e, kinds) for e in chain)
    names = [type(e).__name__ for e in chain]
    if found(errors.GatedRepoError):
        return ("it is gated: accept its terms on its page of the hub, then set HF_TOKEN to a "
                "token of that account (or run hf auth login)")
    if found(errors.RepositoryNotFoundError):
        return ("neither a path here nor a repository of the hub, or a private one: check the "
                "name; a private one needs HF_TOKEN")
    if (found(errors.LocalEntryNotFoundError, ConnectionError)
            or any("Connect" in name or "Timeout" in name for name in names)):
        return ("not in the cache, and the hub cannot be reached: check the path, the network and "
                "HF_HUB_OFFLINE, or copy it from a machine with network and give its path")
    if found(errors.EntryNotFoundError):
        return "the hub's repository lacks a file that is needed: check the name"
    return f"{type(error).__name__}: {brief(error, 200)}"


def load_settings(cls, argv, folders=None):
    """Fill the dataclass `cls` from `argv`: YAML files, `key=value` and `--key value` words, in
    that order of reading. `--key` of a bool needs no value.

    folders: a list that takes the words which are none of these; without it such a word is read
    as a YAML file. Raises InputError on an unknown key, a value of the wrong type, or a file that
    is missing or not a YAML mapping.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if "-h" in argv or "--help" in argv:
        print(f"{sys.modules[cls.__module__].__doc__}\nSettings, their defaults and what they do "
              f"(key=value):\n{_settings_text(cls)}")
        raise SystemExit(0)
    values, words = {}, list(argv)
    while words:
        word = words.pop(0)
        if word.startswith("--") and "=" not in word:
            field = fields.get(word.removeprefix("--").replace("-", "_"))
            if field and field.type is bool and words[:1] not in (["true"], ["false"]):
                words.insert(0, "true")
            if not words:
                raise InputError(f"{word} has no value; write {word} VALUE")
            word = f"{word}={words.pop(0)}"
        elif folders is not None and "=" not in word and not word.endswith((".yaml", ".yml")):
            folders.append(word)
            continue
        if "=" in word:
            key, text = word.removeprefix("--").split("=", 1)
            new, where = {key.replace("-", "_"): text}, "command line"
        else:
            new, where = _read_yaml(word), word
        for key, value in new.items():
            if key not in fields:
                near = difflib.get_close_matches(str(key), fields, 1)
                hint = (f", did you mean '{near[0]}'?" if near
                        else f"; known ones: {', '.join(fields)}")
                raise InputError(f"{where}: unknown setting '{key}'{hint}")
            values[key] = _convert(key, value, fields[key].type, where)
    return cls(**values)


def _settings_text(cls):
    """The lines that declare the settings of `cls`, with their comments: its own, then the
    inherited ones that it leaves as they are."""
    lines, seen = [], set()
    for part in filter(dataclasses.is_dataclass, cls.__mro__):
        body = inspect.getsource(part).partition(":\n")[2].rstrip().splitlines()
        names = [line.split(":")[0].strip() for line in body]
        lines += [line for line, name in zip(body, names) if name not in seen]
        seen |= set(names)
    return "\n".join(lines)


def _read_yaml(path):
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such settings file; give a YAML file or key=value")
    try:
        loaded = yaml.safe_load(read_text(path)) or {}
    except yaml.YAMLError as e:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: a settings file holds 'key: value' lines, this one holds a "
                         f"{type(loaded).__name__}")
    return loaded


def _convert(key, value, kind, where):
    """`value` (a YAML value or the text of a command-line word) as a bool, int, float or str."""
    if isinstance(value, str) and kind is not str:
        try:
            value = yaml.safe_load(value)
            if kind is float and isinstance(value, str):
                value = float(value)  # YAML 1.1 reads 1e-3 as text
        except (yaml.YAMLError, ValueError):
            pass
    if kind is float and type(value) is int:
        value = float(value)
    if kind is str and type(value) in (int, float, bool):
        value = str(value).lower()  # a bool as YAML writes it
    if type(value) is not kind:
        raise InputError(f"{where}: '{key}' must be {kind.__name__}, not {value!r}")
    return value
