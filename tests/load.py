"""Does the live server keep its promises under load? A script, not a test of the suite: it takes
minutes, and the whole machine.

    python tests/load.py                      two minutes with as many conversations as it promises,
                                              then faulty clients beside a good one
    python tests/load.py load seconds=20      (words: load, faults, memory, proxy; any of them)
    python tests/load.py memory minutes=30    one long conversation: is the server's memory flat?
    python tests/load.py proxy                two servers behind configs/nginx.conf, one is killed

Starts serve.py itself, with the words in `serve` added, and ends it. The clients are talk.py's, in
this one process, and send Opus at the pace of speech; so the times hold for a machine on which
nothing else runs. Loopback only. Exit status 1: a promise was broken.
"""
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np
import websockets

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from codec import load_codec, read_audio  # noqa: E402  behind the path
from config import InputError, load_settings  # noqa: E402
from ogg import FRAME, FRAME_SECONDS, RATE, OggWriter, OpusEncoder  # noqa: E402
from talk import Answer, send_recording  # noqa: E402

MEGABYTE = 1 << 20


@dataclass
class Config:
    file: str = "tests/speech/dialogue.ogg"  # what is said to the server, again and again
    seconds: float = 120.0  # load and proxy: of each conversation
    minutes: float = 30.0  # memory: of the conversation
    sessions: int = 0  # load: how many; 0: as many as the server promises
    codec: str = "default/codec.safetensors"  # how far it looks ahead
    serve: str = ""  # more words for serve.py: "model=... slots=4"


# --------------------------------------------------------------------------------------------------
# The server


@contextlib.contextmanager
def server(words, port=0):
    """serve.py in a process of its own, ready to talk: (process, "http://localhost:PORT")."""
    if not port:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "serve.py"), f"port={port}", *words.split()]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    address = f"http://localhost:{port}"
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError):
                health(address)
                break
            time.sleep(0.2)
        if process.returncode is not None:
            raise InputError("serve.py did not start; its own line above says why")
        yield process, address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def health(address):
    with urllib.request.urlopen(f"{address}/health", timeout=10) as response:
        return json.load(response)


def memory(process):
    """Megabytes of memory that a process holds now (Linux)."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MEGABYTE


# --------------------------------------------------------------------------------------------------
# The clients


def speech(cfg, seconds):
    """(n, 1920): so many seconds of the file's first channel, from its beginning again where it
    ends."""
    audio = read_audio(ROOT / cfg.file, sample_rate=RATE)[0].numpy()
    frames = np.pad(audio, (0, -len(audio) % FRAME)).reshape(-1, FRAME)
    return np.resize(frames, (round(seconds / FRAME_SECONDS), FRAME))


async def converse(address, frames, answer, begin=0.0, seed=0):
    """One conversation, from `begin` seconds on, at the pace of speech; what comes goes into
    `answer`."""
    await asyncio.sleep(begin)
    async with aiohttp.ClientSession() as http:
        url = f"{address.replace('http', 'ws')}/api/chat?seed={seed}"
        async with http.ws_connect(url, max_msg_size=0) as ws:
            listening = asyncio.create_task(answer.listen(ws))
            await answer.begun.wait()
            await send_recording(ws, frames, answer, True)
            await ws.close()
            await listening


async def progress(answers, most):
    """A line that is written over every second: until it is cancelled."""
    while True:
        late = sum(int((answer.waits() > FRAME_SECONDS).sum()) for answer in answers)
        done = max(len(answer.frames) for answer in answers) * FRAME_SECONDS
        print(f"\r{done:.0f} of {most:.0f} s, {late} frames late", end="", file=sys.stderr)
        await asyncio.sleep(1)


async def gather(conversations, answers, seconds):
    """Runs the conversations to their ends, behind a line of progress."""
    line = asyncio.create_task(progress(answers, seconds))
    try:
        await asyncio.gather(*conversations)
    finally:
        line.cancel()
        print(file=sys.stderr)


def show(what, waits):
    """A line of milliseconds: waits (n,) in seconds."""
    middle, high, worst = 1000 * np.percentile(waits, [50, 99, 100])
    print(f"{what}: median {middle:.0f} ms, 99th percentile {high:.0f} ms, worst {worst:.0f} ms",
          flush=True)


# --------------------------------------------------------------------------------------------------
# What is tried. Each returns whether the promise was kept.


def load(cfg):
    """As many conversations as promised: frames late, and how soon a sample can be answered."""
    with server(cfg.serve) as (process, address):
        many = cfg.sessions or health(address)["slots"]
        frames, before = speech(cfg, cfg.seconds), memory(process)
        answers = [Answer() for _ in range(many)]
        begins = np.random.default_rng(0).uniform(0, 2, many)  # so that frames come at any time
        asyncio.run(gather([converse(address, np.roll(frames, 20 * i, 0), answer, begins[i], i)
                            for i, answer in enumerate(answers)], answers, cfg.seconds))
        after = memory(process)
    waits = np.concatenate([answer.waits() for answer in answers])
    late = (waits > FRAME_SECONDS).mean()
    print(f"{many} conversations of {cfg.seconds:g} s: {len(waits)} of {many * len(frames)} frames "
          f"were answered, {late:.2%} of them later than 80 ms")
    show("a frame's sending to its answer", waits)
    ahead = load_codec(cfg.codec).streaming(1).lookahead
    show("a sample's sending to the first sample that could answer it",
         np.concatenate([first_answers(answer, ahead) for answer in answers]))
    print(f"memory of the server: {before:.0f} MB at the start, {after:.0f} MB at the end")
    return len(waits) == many * len(frames) and late <= 0.01


def first_answers(answer, ahead):
    """Seconds from the sending of each frame to the answer of `ahead` frames later, (n,): with a
    codec that looks ahead, the model hears a frame that much later."""
    return np.array([came - sent for came, sent in zip(answer.came_at[ahead:], answer.sent_at)])


def memory_flat(cfg):
    """One conversation of cfg.minutes: the server's memory at each minute."""
    seconds, sizes = cfg.minutes * 60, []

    async def watch(process):
        while True:
            sizes.append(memory(process))
            await asyncio.sleep(60 if cfg.minutes > 5 else 5)

    async def both(process, address):
        answer = Answer()
        watching = asyncio.create_task(watch(process))
        await gather([converse(address, speech(cfg, seconds), answer)], [answer], seconds)
        watching.cancel()
        sizes.append(memory(process))
        return answer
    with server(f"{cfg.serve} minutes={cfg.minutes + 1}") as (process, address):
        answer = asyncio.run(both(process, address))
    settled = sizes[len(sizes) // 6:]  # from a sixth on
    print(f"memory of the server, MB: {' '.join(f'{size:.0f}' for size in sizes)}; "
          f"{settled[-1] - settled[0]:+.1f} MB since a sixth of the time")
    show(f"{len(answer.frames)} frames, a frame's sending to its answer", answer.waits())
    return settled[-1] - settled[0] < 8 and len(answer.frames) == round(seconds / FRAME_SECONDS)


# -- faults


def messages(frames):
    encoder, writer = OpusEncoder(), OggWriter()
    return [b"\x01" + writer.write(encoder.encode(frame)) for frame in frames]


def connect(address):
    return websockets.connect(f"{address.replace('http', 'ws')}/api/chat", close_timeout=1)


async def vanish(address, good):
    """Some frames, then nothing more, not even a close."""
    async with connect(address) as ws:
        for message in good[:9]:
            await ws.send(message)
            await asyncio.sleep(FRAME_SECONDS)
        ws.transport.abort()


async def rubbish(address, good):
    """Every kind of message with noise in it."""
    noise = np.random.default_rng(0)
    async with connect(address) as ws:
        for number in range(200):
            await ws.send(bytes([number % 12]) + noise.bytes(int(noise.integers(0, 5000))))
            await asyncio.sleep(0.02)


async def half_a_page(address, good):
    """Pages that end in the middle."""
    async with connect(address) as ws:
        for message in good:
            await ws.send(message[:len(message) // 2])
            await asyncio.sleep(FRAME_SECONDS)


async def flood(address, good):
    """More than ten minutes of audio at once."""
    async with connect(address) as ws:
        for _ in range(250):
            await ws.send(b"\x08" + bytes(60000))


async def stall(address, good):
    """Speaks and never reads."""
    async with connect(address) as ws:
        await ws.recv()
        for message in good:
            await ws.send(message)
            await asyncio.sleep(FRAME_SECONDS)


async def knock(address, good):
    """Two hundred connections a second that are closed at once."""
    async def once(http):
        with contextlib.suppress(aiohttp.ClientError):
            async with http.ws_connect(f"{address.replace('http', 'ws')}/api/chat"):
                pass
    end = time.monotonic() + len(good) * FRAME_SECONDS
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        running = set()
        while time.monotonic() < end:
            running = {task for task in running if not task.done()}
            running.add(asyncio.create_task(once(http)))
            await asyncio.sleep(0.005)
        await asyncio.gather(*running)


FAULTY = (vanish, rubbish, half_a_page, flood, stall, knock)


def faults(cfg):
    """Does a conversation stay the same, bit for bit, beside clients that do everything wrong?"""
    frames = speech(cfg, 12)
    with server(cfg.serve) as (process, address):
        alone, beside = Answer(), Answer()
        asyncio.run(gather([converse(address, frames, alone, seed=7)], [alone], 12))
        others = [spoil(other, address, messages(frames)) for other in FAULTY]
        asyncio.run(gather([converse(address, frames, beside, seed=7), *others], [beside], 12))
        free = wait_for_slots(address)
    same = len(beside.frames) == len(frames) and np.array_equal(alone.frames, beside.frames)
    names = ", ".join(other.__name__ for other in FAULTY)
    print(f"beside {names}: the answer is {'the same, bit for bit' if same else 'ANOTHER'}; "
          f"the slots are {'all free again' if free else 'NOT free again'}")
    show("its frames' sending to their answers, alone", alone.waits())
    show("beside them", beside.waits())
    return same and free


async def spoil(faulty, address, good):
    """Runs a faulty client, a second after the good one has begun. That the server ends it is
    right."""
    await asyncio.sleep(1)
    with contextlib.suppress(OSError, websockets.WebSocketException):
        await faulty(address, good)


def wait_for_slots(address):
    """Whether all are free within 20 s."""
    for _ in range(100):
        state = health(address)
        if state["free"] == state["slots"]:
            return True
        time.sleep(0.2)
    return False


# -- several servers


@contextlib.contextmanager
def nginx():
    """Debian's nginx with configs/nginx.conf, which names its ports: its address."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nginx", "-c", str(ROOT / "configs/nginx.conf"), "-p", folder]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            time.sleep(1)
            yield "http://localhost:8080"
        finally:
            process.terminate()
            process.wait(20)


def proxy(cfg):
    """Two servers behind nginx with two conversations each; one server is killed in the middle."""
    frames, answers = speech(cfg, cfg.seconds), [Answer() for _ in range(4)]

    async def kill(process):
        await asyncio.sleep(cfg.seconds / 2)
        process.kill()

    async def run(doomed, address):
        late = Answer()
        begins = [0.5 * i for i in range(4)]
        talks = [converse(address, frames, answer, begin)
                 for answer, begin in zip(answers, begins)]
        new = converse(address, frames[:25], late, cfg.seconds / 2 + 3)
        await gather([*talks, kill(doomed), new], answers, cfg.seconds)
        return len(late.frames) == 25
    words = f"{cfg.serve} slots=2"
    with server(words, 8001) as (doomed, _), server(words, 8002), nginx() as address:
        came_in = asyncio.run(run(doomed, address))
    whole = [len(answer.frames) == len(frames) for answer in answers]
    print(f"4 conversations through nginx on two servers, one killed after {cfg.seconds / 2:g} s: "
          f"frames answered {[len(answer.frames) for answer in answers]} of {len(frames)}; "
          f"a new conversation after it {'was' if came_in else 'was NOT'} answered")
    show("a frame's sending to its answer, where the server lived",
         np.concatenate([answer.waits() for answer, lived in zip(answers, whole) if lived]))
    return sum(whole) == 2 and came_in


def main(argv):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers are ended then, too
    words = []
    cfg = load_settings(Config, argv, words)
    tried = {"load": load, "faults": faults, "memory": memory_flat, "proxy": proxy}
    words = words or ["load", "faults"]
    for word in words:
        if word not in tried:
            raise InputError(f"'{word}' is none of {', '.join(tried)}")
    kept = [tried[word](cfg) for word in words]
    sys.exit(not all(kept))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as e:
        sys.exit(f"load.py: {e}")
