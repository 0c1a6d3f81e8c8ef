"""Talk to the model: a live full-duplex server that speaks Moshi's protocol, and its page.

    python serve.py                       then open http://localhost:8998
    python serve.py host=0.0.0.0 ssl=true token=SECRET    for others on the network, at https://
    python serve.py mode=echo             gives back what it hears: tests a client's alignment

A client opens a WebSocket at /api/chat. Byte 0 of every message is its kind:

    00 handshake, from the server             01 Ogg/Opus, both ways
    02 UTF-8 text, from the server            03 JSON settings, from the client, before all audio
    04 JSON events, with events=true          05 UTF-8 error, from the server
    08 PCM: int16, little endian, 24 kHz, mono; both ways, from the server with format=pcm
    09 Opus packets, each behind its length as little-endian uint16; likewise, format=opus

Audio is 24 kHz mono in frames of 1920 samples (80 ms). Lockstep: one frame out for each frame in,
from the first, and none before it; frame k of the answer is what the model says after hearing
frame k. Frames that came before the handshake (at most 60 s) are answered too, and after a close
with code 1000 what is still to be answered is, for up to 8 s (a wait for a slot included).
"""
import asyncio
import collections
import concurrent.futures
import contextlib
import copy
import functools
import hmac
import ipaddress
import itertools
import json
import math
import multiprocessing
import queue
import secrets
import signal
import socket
import ssl
import struct
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.signal

from config import InputError, brief, end_with_parent, load_settings, make_folder
from ogg import FRAME, FRAME_SECONDS, RATE, OggReader, OggWriter, OpusDecoder, OpusEncoder

try:
    import prometheus_client
    from aiohttp import WSCloseCode, WSMsgType, web
except ImportError as e:
    sys.exit(f"serve.py: {e.name} is missing; python -m pip install -r requirements-live.txt")

HANDSHAKE, OGG, TEXT, SETTINGS, EVENT, ERROR, PCM, PACKETS = 0, 1, 2, 3, 4, 5, 8, 9  # kinds
DRAIN_SECONDS = 8.0  # the stock clients wait 10 s for the end of a close
HEARTBEAT = 10.0  # seconds between pings; a client that answers none for half of it is gone
GATHER = 0.02  # seconds that a frame may wait for others to share its tick
MOST_BEHIND = 750  # frames (60 s): heard and not yet answered, or answered and not yet fetched
MOST_RUBBISH = 1 << 20  # bytes that hold no audio
MOST_BYTES = 1 << 16  # of a message
MOST_PROMPT = 256  # tokens; the more, the longer takes every frame
PROMPT_KEYS = ("name", "other", "narrative", "backchannels", "interruptions", "starts")


@dataclass
class Config:
    host: str = "localhost"  # 0.0.0.0: everyone on the network may come
    port: int = 8998
    mode: str = "talk"  # echo: gives back what it hears, without a model
    model: str = "default/model"  # checkpoint folder or hub id
    codec: str = "default/codec.safetensors"
    voices: str = "default/data/voices.json"  # voice name -> speaker embedding
    record: str = ""  # folder for the conversations: wav, JSON and PNG as generate.py writes them
    # how many and how long
    slots: int = 0  # conversations at a time; 0: as many as keep 80 ms, measured at the start
    most_slots: int = 16  # where the measurement stops
    queue: int = 16  # clients that may wait for a slot; the next one gets 503
    minutes: float = 30.0  # limit of a conversation
    idle: float = 30.0  # seconds without audio after which one is ended
    # who may come
    ssl: bool = False  # https; makes a certificate if there is none
    certificate: str = "out/tls"  # folder with cert.pem and key.pem
    token: str = ""  # clients must give it: /api/chat?token=..., or Authorization: Bearer ...
    origins: str = ""  # origins of other sites' pages that may connect, with commas between
    # for tests
    slow: float = 0.0  # mode=echo: seconds that a frame takes


# --------------------------------------------------------------------------------------------------
# What a client may ask for

DEFAULTS = {"name": "Molly", "other": "Henry", "backchannels": 2, "interruptions": 0,
            "narrative": "You had a new job as a driver in Boston. Henry was happy for you.",
            "starts": True, "seed": None,
            "text_temperature": None, "audio_temperature": None, "text_topk": None,
            "audio_topk": None, "voice": "", "format": "ogg", "events": False}  # None: the model's
LIMITS = {"name": 40, "other": 40, "narrative": 1000, "backchannels": (0, 40),
          "interruptions": (0, 20), "seed": (0, 2 ** 53), "text_temperature": (0, 2),
          "audio_temperature": (0, 2), "text_topk": (0, 100000), "audio_topk": (0, 100000)}
# what PersonaPlex's and Moshi's clients call ours, and what they send that means nothing here
ALIASES = {"text_prompt": "narrative", "voice_prompt": "voice", "text_seed": "seed"}
WITHOUT_MEANING = ("audio_seed", "pad_mult", "repetition_penalty", "repetition_penalty_context",
                   "image_url", "image_resolution", "worker_auth_id", "email", "token")
THEIR_VOICES = [f"{kind}{i}" for kind, n in (("NATF", 4), ("NATM", 4), ("VARF", 5), ("VARM", 5))
                for i in range(n)]  # PersonaPlex's; each stands for one of ours


class BadParameter(ValueError):
    """A wrong parameter of a query: its name and what is wrong."""

    def __init__(self, name, problem):
        super().__init__(f"{name}: {problem}")
        self.name = name


def read_wishes(given, voices):
    """A query (or JSON object) -> all settings of a conversation, DEFAULTS where it has none.

    given: name -> text. voices: the names there are. Raises BadParameter.
    """
    wishes = dict(DEFAULTS, voice=voices[0] if voices else "")
    for name, text in given.items():
        key = ALIASES.get(name, name)
        if name in WITHOUT_MEANING or (name in ALIASES and key in given):  # our own name wins
            continue
        if key not in DEFAULTS:
            raise BadParameter(name, f"unknown; there are {', '.join([*DEFAULTS, *ALIASES])}")
        wishes[key] = read_wish(name, key, text.strip(), voices)
    if wishes["seed"] is None:
        wishes["seed"] = secrets.randbits(31)
    return wishes


def read_wish(name, key, text, voices):
    """The value that `text` gives to the setting `key`, which the client called `name`."""
    limit = LIMITS.get(key)
    if key == "voice":
        return read_voice(name, text, voices)
    if key in ("starts", "events"):
        if text.lower() not in ("true", "false", "1", "0"):
            raise BadParameter(name, f"must be true or false, not {text[:40]!r}")
        return text.lower() in ("true", "1")
    if key == "format":
        if text not in ("ogg", "opus", "pcm"):
            raise BadParameter(name, f"must be ogg, opus or pcm, not {text[:40]!r}")
        return text
    if isinstance(limit, int):
        text = " ".join(text.removeprefix("<system>").removesuffix("<system>").split())
        if len(text) > limit or not text.isprintable():
            raise BadParameter(name, f"must be at most {limit} printable characters")
        return text or DEFAULTS[key]
    kind = float if key.endswith("temperature") else int
    try:
        value = kind(text)
    except ValueError:
        raise BadParameter(name, f"must be a number, not {text[:40]!r}") from None
    if not limit[0] <= value <= limit[1]:
        raise BadParameter(name, f"must lie in {limit[0]}..{limit[1]}, not {text[:40]}")
    return value


def read_voice(name, text, voices):
    """The voice of ours that `text` names: itself, or one of PersonaPlex's with or without .pt."""
    theirs = text.removesuffix(".pt")
    if text in voices or not text:
        return text or (voices[0] if voices else "")
    if theirs in THEIR_VOICES:
        return voices[THEIR_VOICES.index(theirs) % len(voices)] if voices else ""
    raise BadParameter(name, f"no voice {text[:40]!r}; there are {', '.join(voices) or 'none'}")


# --------------------------------------------------------------------------------------------------
# The model's thread


class Echo:
    """In the model's place: says what it hears."""

    voices = []

    def __init__(self, cfg):
        self.slow = cfg.slow

    def check(self, wishes):
        """Raises BadParameter for what the model cannot take."""

    def prepare(self, wishes):
        """Called before a conversation begins: reads its prompt."""

    def leave(self, session):
        """Called when one has ended."""

    def grow_old(self):
        """Makes all conversations as old as they get, for the measurement."""

    def tick(self, sessions, heard):
        """One frame for each of `sessions`: heard (B, 1920) -> said (B, 1920), and per session a
        list of (mark, text): the words that have begun, or parts of them."""
        if self.slow:
            time.sleep(self.slow)
        return heard, [[] for _ in sessions]


class Batch(threading.Thread):
    """The model in a thread of its own: tick after tick, each over all sessions that have a frame.

    Who has no frame is left as it is. A frame waits for one running tick at most, and is answered
    by the next. A tick costs nearly as much for one session as for all; so where not every frame
    can have one of its own, it waits up to 20 ms (GATHER) for the frames of others. Sessions come
    and go between ticks.
    """

    def __init__(self, engine, deliver, failed, metrics):
        super().__init__(daemon=True, name="model")
        self.engine, self.deliver, self.failed, self.metrics = engine, deliver, failed, metrics
        self.events = queue.SimpleQueue()  # (kind, session, what): from the event loop
        self.waiting = {}  # session -> deque of (frame (1920,), time when it was whole)
        self.took = 0.0  # seconds of the last tick

    def run(self):
        try:
            while self.take_events():
                if self.patience() == 0:
                    self.tick([session for session, frames in self.waiting.items() if frames])
            for session in self.waiting:
                self.engine.leave(session)
        except Exception as e:  # whatever it is: nobody may be left waiting for an answer
            self.failed(e)

    def patience(self):
        """Seconds until the next tick has to begin; None: there is no frame yet."""
        came = [frames[0][1] for frames in self.waiting.values() if frames]
        if not came:
            return None
        sessions = len(self.waiting)
        if len(came) == sessions or sessions * self.took < FRAME_SECONDS:
            return 0
        return max(0, min(came) + GATHER - time.monotonic())

    def take_events(self):
        """Takes what has come, and waits for more while there is patience. False: the end."""
        while True:
            try:
                kind, session, what = self.events.get(timeout=self.patience())
            except queue.Empty:
                return True
            if kind == "end":
                return False
            if kind == "prepare":
                self.engine.prepare(what)
            elif kind == "frame":
                self.waiting.setdefault(session, collections.deque()).append(what)
            elif self.waiting.pop(session, None) is not None:  # "leave"
                self.engine.leave(session)

    def tick(self, ready):
        frames = [self.waiting[session].popleft() for session in ready]
        begin = time.monotonic()
        said, words = self.engine.tick(ready, np.stack([frame for frame, _ in frames]))
        self.took = time.monotonic() - begin
        self.metrics.tick.observe(self.took)
        self.metrics.behind.set(sum(map(len, self.waiting.values())))
        self.deliver(list(zip(ready, said, words, [came for _, came in frames])))


# --------------------------------------------------------------------------------------------------
# The model behind the batch


class Resampler:
    """Frames at one rate -> frames at another, piece by piece: a window with the last samples in
    front goes through scipy's filter, of which the middle is taken. Its delay is constant: 13
    samples (0.6 ms) from 24 kHz to 22.05 kHz, 12 (0.5 ms) back."""

    def __init__(self, rate_in, rate_out):
        shared = math.gcd(rate_in, rate_out)
        self.up, self.down = rate_out // shared, rate_in // shared
        self.past = np.zeros(self.down, np.float32)  # as long as `up` samples that come out
        # the filter reaches 10 samples of the lower rate to both sides
        self.delay = math.ceil(10.5 * max(self.up, self.down) / self.down) + 1
        taps = 20 * max(self.up, self.down) + 1
        self.filter = scipy.signal.firwin(taps, 1 / max(self.up, self.down), window=("kaiser", 5.0))

    def __call__(self, frame):
        """(n,) -> (n * up / down,)."""
        if self.up == self.down:
            return frame
        window = np.concatenate([self.past, frame])
        self.past = window[-self.down:]
        made = scipy.signal.resample_poly(window, self.up, self.down, window=self.filter)
        begin = self.up - self.delay
        return made[begin:begin + len(frame) * self.up // self.down].astype(np.float32)


class Words:
    """Text ids, one a frame -> (mark, text) for clients, as generate.stream_words reads them: whole
    letters, a space in front of what begins a word."""

    def __init__(self, tokenizer):
        from data import EXTRA_TOKENS, WORD_PAD, mark_kind
        self.tokenizer, self.word_pad, self.mark_kind = tokenizer, WORD_PAD, mark_kind
        self.pads = {*EXTRA_TOKENS, tokenizer.eos_token}
        self.ids, self.shown, self.mark, self.before = [], "", "", ""

    def read(self, number):
        """-> list of (mark, text), empty or of one."""
        token = self.tokenizer.convert_ids_to_tokens(number)
        if token == self.word_pad and self.before:
            self.before = "word pad"
        elif token in self.pads:
            self.mark, self.before = (token if self.mark_kind(token) else ""), ""
        else:
            if self.before != "piece" or token[0] in "Ġ▁ ":
                self.ids, self.shown = [], ""
            self.ids.append(number)
            self.before = "piece"
            word = self.tokenizer.decode(self.ids).strip()
            if len(word) > len(self.shown) and not word.endswith("\ufffd"):  # half a letter
                mark, text = self.mark, " " * (not self.shown) + word[len(self.shown):]
                self.shown, self.mark = word, ""
                return [(mark, text)]
        return []


class Seat:
    """What the model's thread keeps of one session besides its row of the batch."""

    def __init__(self, talk, session):
        codec = talk.codec
        self.stream, self.frames = talk.sound.stream(), 0  # how many it has heard
        self.down, self.up = Resampler(RATE, codec.sample_rate), Resampler(codec.sample_rate, RATE)
        self.words, self.text = Words(talk.tokenizer), collections.deque()
        self.recording, self.folder = None, talk.cfg.record
        if talk.cfg.record and session.recorded:
            with self.sparing():
                self.recording = Recording(talk, session.wishes)

    @contextlib.contextmanager
    def sparing(self):
        """Around a step of the recording: a fault (a full disk) costs it alone, not the talk."""
        try:
            yield
        except (OSError, concurrent.futures.BrokenExecutor) as e:
            tell_lost(self.recording.stem if self.recording else self.folder, e)
            self.recording = None


class Sound:
    """The codec for sessions that are at frames of their own. MiniCodec's layers keep their past in
    a dict, so the pasts of any sessions go through it together; others go one by one."""

    def __init__(self, codec, device):
        import torch
        self.torch, self.codec, self.device = torch, codec, device
        silence = torch.zeros(1, 8 * codec.samples_per_frame, device=device)
        self.silence = codec.encode(silence)[0][0, :, 4]  # (K,)
        self.blank = None
        if hasattr(codec, "analyse"):
            used = codec.streaming(1)
            used.decode(used.encode(silence))
            self.blank = [{layer: torch.zeros_like(past) for layer, past in state.items()}
                          for state in (used.heard, used.said)]

    def stream(self):
        """What is kept of one session."""
        stream = self.codec.streaming(1)
        if self.blank:
            stream.heard, stream.said = map(dict, self.blank)
        return stream

    def encode(self, seats, audio):
        """audio (B, samples), the next frame of each -> codes (B, K) of the last frame that can be
        coded by now; silence where there is none yet."""
        audio = audio.to(self.device)
        if self.blank:
            states = [seat.stream.heard for seat in seats]
            codes = self.together(states, audio, lambda *given: self.codec.analyse(*given)[1])
        else:
            codes = [seat.stream.encode(row[None]) for seat, row in zip(seats, audio)]
            codes = [found if found.shape[2] else self.silence[None, :, None] for found in codes]
            codes = self.torch.cat(codes)
        for seat, found in zip(seats, codes):
            if seat.frames < seat.stream.lookahead:
                found[:, 0] = self.silence
            seat.frames += 1
        return codes[:, :, 0]

    def decode(self, seats, codes):
        """codes (B, K), the next frame of each -> audio (B, samples), numpy."""
        if self.blank:
            values = self.codec.fsq.decode(codes[:, :, None])
            states = [seat.stream.said for seat in seats]
            audio = self.together(states, values, self.codec.synthesise)
        else:
            audio = [seat.stream.decode(row[None, :, None]) for seat, row in zip(seats, codes)]
            audio = self.torch.cat(audio)
        return audio.clamp(-1, 1).float().cpu().numpy()

    def together(self, states, values, call):
        """call(values, state) with the rows of `states`, which it renews. values (B, ...).

        Fewer than four rows are filled up with the first: from four on, a row's bits do not depend
        on how many stand beside it (as measured here; else the same but for rounding).
        """
        rows = [*range(len(states)), *[0] * (4 - len(states))]
        state = {layer: self.torch.cat([states[row][layer] for row in rows])
                 for layer in states[0]}
        made = call(values[rows], state)
        for row, one in enumerate(states):
            one.update({layer: past[row:row + 1] for layer, past in state.items()})
        return made[:len(states)]


class Talk:
    """The model and its codec, for sessions that come and go.

    At the start of a session the model says frame 0, which nobody hears. From then on a tick takes
    frame k of the microphone and gives frame k + 1 of the model. If the codec looks ahead
    (MiniCodec: one frame), the codes of frame k come that much later, and so the model hears it.
    """

    def __init__(self, cfg):
        import torch

        import generate
        from codec import load_codec
        from config import use_threads
        from model import load_checkpoint
        use_threads()
        self.torch, self.generate, self.cfg = torch, generate, cfg
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        loaded = load_checkpoint(cfg.model, self.device, dtype)
        self.model, self.tokenizer, self.fmt, trained = loaded
        self.codec = load_codec(cfg.codec).to(self.device)
        if self.codec.samples_per_frame != round(self.codec.sample_rate * FRAME_SECONDS):
            raise InputError(f"{cfg.codec}: its frames are not of 80 ms, so it cannot talk live")
        # voices of its own: as with generate.py's own prompts
        parts = generate.Config(model=cfg.model, codec=cfg.codec, voices=cfg.voices, prompts="live")
        self.encoder = generate.check_parts(parts, self.model, self.codec, trained)
        self.sampling = generate.sampling_of(parts, trained)
        self.embeddings = generate.read_voices(cfg.voices)
        self.voices, size = sorted(self.embeddings), self.model.speaker_size
        wrong = [name for name in self.voices if size and len(self.embeddings[name]) != size]
        if wrong or not self.voices:
            found = f"voice {wrong[0]} is not one" if wrong else "holds no voice"
            raise InputError(f"{cfg.voices}: {found} of {size} numbers, which {cfg.model} takes; "
                             "give the voices of its training data")
        self.rows, self.seats = [], {}  # sessions in the order of the batch's rows; session -> Seat
        self.prefix = functools.lru_cache(64)(self.read_prefix)
        self.loop_tokenizer = copy.deepcopy(self.tokenizer)  # one for each thread
        most = cfg.slots or cfg.most_slots
        self.talkers = generate.Conversation(self.model, self.tokenizer, self.fmt, most,
                                             MOST_PROMPT + 1, may_end=False)
        self.sound = Sound(self.codec, self.device)

    @functools.cached_property
    def writer(self):
        """The process that writes recordings."""
        spawn = multiprocessing.get_context("spawn")  # after torch has run threads, a fork may hang
        return concurrent.futures.ProcessPoolExecutor(1, spawn, initializer=start_writer)

    def write_out(self, job):
        """Gives the writing process a job of write_recording; to a new one, if it was killed."""
        try:
            written = self.writer.submit(write_recording, job)
        except concurrent.futures.BrokenExecutor:
            del self.writer
            written = self.writer.submit(write_recording, job)
        written.add_done_callback(lambda done: tell_lost(job["stem"], done.exception()))

    def check(self, wishes):
        """Raises BadParameter for a prompt that is too long for a row."""
        tokens = len(self.loop_tokenizer.encode(self.prompt(wishes), add_special_tokens=False))
        if tokens > MOST_PROMPT:
            raise BadParameter("narrative", f"makes a prompt of {tokens} tokens; {MOST_PROMPT} is "
                               "the limit")

    def prompt(self, wishes):
        from data import make_prompt
        return make_prompt(*(wishes[key] for key in PROMPT_KEYS))

    def read_prefix(self, prompt, voice):
        """The model's state after this prompt; kept for the next who has the same."""
        speaker = self.torch.tensor([self.embeddings[voice]], dtype=self.torch.float32)
        return self.generate.read_prefix(self.model, self.tokenizer, [prompt], speaker)

    # -- called by the batch's thread

    def prepare(self, wishes):
        self.prefix(self.prompt(wishes), wishes["voice"])

    def sampling_for(self, wishes):
        """The keywords of Sampler: the server's, and what a client wants instead."""
        own = {"decision_temperature": wishes["text_temperature"],
               "word_temperature": wishes["text_temperature"],
               "audio_temperature": wishes["audio_temperature"],
               "text_top_k": wishes["text_topk"], "audio_top_k": wishes["audio_topk"]}
        return self.sampling | {key: value for key, value in own.items() if value is not None}

    def join(self, session):
        """A row for a session's first frame."""
        wishes = session.wishes
        sampler = self.generate.Sampler([wishes["seed"]], **self.sampling_for(wishes))
        prefix = self.prefix(self.prompt(wishes), wishes["voice"])
        said, text = self.talkers.join(prefix, sampler)
        seat = self.seats[session] = Seat(self, session)
        self.rows.append(session)
        seat.text.extend(text[0].tolist())
        seat.words.read(seat.text[0])  # of frame 0
        if seat.recording:
            seat.recording.text.append(seat.text[0])
        seat.text.popleft()

    def leave(self, session):
        if session not in self.seats:
            return
        row, seat = self.rows.index(session), self.seats.pop(session)
        self.talkers.leave(row)
        self.rows[row] = self.rows[-1]
        self.rows.pop()
        if seat.recording:
            with seat.sparing():
                seat.recording.finish()

    def grow_old(self):
        """As Echo.grow_old: a frame costs most when the ring of past frames is full."""
        memory = self.talkers.memory
        memory.age += memory.frames
        memory.ages = [age + memory.frames for age in memory.ages]

    def tick(self, sessions, heard):
        """As Echo.tick."""
        for session in sessions:
            if session not in self.seats:
                self.join(session)
        places = [self.rows.index(session) for session in sessions]
        seats = [self.seats[session] for session in sessions]
        audio = np.stack([seat.down(frame) for seat, frame in zip(seats, heard)])
        user = self.sound.silence.repeat(len(self.rows), 1)  # (B, K)
        user[places] = self.sound.encode(seats, self.torch.from_numpy(audio))
        waiting = [row for row in range(len(self.rows)) if row not in places]
        said, text = self.talkers.step(user, waiting)
        voices, text = self.sound.decode(seats, said[places]), text.tolist()
        words = []
        for row, seat, samples, voice in zip(places, seats, audio, voices):
            seat.text.append(text[row])
            number = seat.text.popleft()  # what belongs to the sound of now
            words.append(seat.words.read(number))
            if seat.recording:
                with seat.sparing():
                    seat.recording.add(samples, voice, user[row], said[row], number)
        return [seat.up(voice) for seat, voice in zip(seats, voices)], words


class Recording:
    """A conversation on its way to record=DIR. Its sound goes to a file at once, so that memory
    stays flat; the end is written by a process of its own, since drawing takes seconds."""

    numbers = itertools.count()

    def __init__(self, talk, wishes):
        self.talk, self.wishes = talk, wishes
        stem = f"live_{time.strftime('%Y%m%d-%H%M%S')}_{next(self.numbers):04d}"
        self.stem = Path(talk.cfg.record) / stem
        self.file = open(f"{self.stem}.pcm.tmp", "wb")
        self.voice = np.zeros(talk.codec.samples_per_frame, np.float32)  # heard in the next frame
        silence = talk.sound.silence.tolist()
        self.said, self.heard, self.text = [silence], [], []

    def add(self, samples, voice, heard, said, number):
        """A tick: the microphone's samples, the answer, the codes of both, the answer's text id."""
        self.write(samples)
        self.voice = voice
        self.heard.append(heard.tolist())
        self.said.append(said.tolist())
        self.text.append(number)

    def write(self, samples):
        both = np.stack([self.voice, samples], 1).clip(-1, 1)  # (n, 2): the model, the user
        self.file.write((both * 32767).astype("<i2").tobytes())

    def finish(self):
        """The session is over: hands it to the writing process."""
        self.write(np.zeros_like(self.voice))
        self.file.close()
        late = self.talk.codec.streaming(1).lookahead
        silence = [self.talk.sound.silence.tolist()] * (late + 1)
        job = {"stem": str(self.stem), "model": self.talk.cfg.model, "codec": self.talk.cfg.codec,
               "rate": self.talk.codec.sample_rate, "wishes": self.wishes, "text": self.text,
               "prompt": self.talk.prompt(self.wishes),
               "sampling": self.talk.sampling_for(self.wishes),
               "embedding": self.talk.embeddings[self.wishes["voice"]],
               "encoder": self.talk.encoder, "said": self.said,
               "heard": self.heard[late:] + silence}
        self.talk.write_out(job)


def tell_lost(stem, error):
    """Prints that a recording, or one in this folder, is not written; nothing without an error."""
    if error:
        print(f"{stem}: a recording is not written ({brief(error)}); .pcm.tmp holds the sound that "
              "there is", flush=True)


def start_writer():
    """In the writing process: Ctrl-C goes to the server alone, which waits for its recordings; of a
    server that is killed nothing stays."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def write_recording(job):
    """In the writing process: job, as of Recording.finish -> stem.wav, .json and .png as
    generate.py writes them. The user's channel is what came in, the codes what the model heard."""
    import torch
    from transformers import AutoTokenizer

    from generate import save_dialogue
    stem, sound = Path(job["stem"]), Path(f"{job['stem']}.pcm.tmp")
    audio = np.fromfile(sound, "<i2").reshape(-1, 2).T.astype(np.float32) / 32767  # (2, samples)
    codes = [torch.tensor(rows).T for rows in (job["said"], job["heard"])]  # (K, T) each
    wishes = job["wishes"]
    keys = ("name", "narrative", "backchannels", "interruptions", "starts", "voice")
    speaker = {key: wishes[key] for key in keys}
    speaker |= {"prompt": job["prompt"], "embedding": job["embedding"]}
    record = {"speaker_encoder": job["encoder"], "settings": wishes, "sampling": job["sampling"],
              "made_by": {"model": job["model"], "codec": job["codec"]}}
    save_dialogue(stem, torch.from_numpy(audio), job["rate"],
                  [speaker, {"name": wishes["other"], "recording": f"{stem.name}.wav"}],
                  [job["text"], None], codes, AutoTokenizer.from_pretrained(job["model"]), record)
    sound.unlink()


class Guest:
    """A session of the measurement."""

    recorded = False

    def __init__(self, wishes):
        self.wishes = wishes


def measure_slots(engine, most):
    """How many conversations keep 80 ms here, printed and returned (at least 1).

    Their frames come at any time, so one may have to wait for a tick to end before its own begins:
    two ticks, with the Opus coding of their answers, must fit into 80 ms, and 30 % of it is kept
    for what else runs here. Measured with conversations as old as they get.
    """
    wishes, times, guests = read_wishes({"seed": "0"}, engine.voices), [], []
    coders, enough = [OpusEncoder() for _ in range(most)], FRAME_SECONDS * 0.35
    while len(guests) < most and (not times or times[-1] <= enough):
        guests.append(Guest(wishes))
        frames = np.zeros((len(guests), FRAME), np.float32)
        engine.tick(guests, frames)  # joins
        engine.grow_old()
        ticks = []
        for _ in range(7):
            begin = time.perf_counter()
            said, _ = engine.tick(guests, frames)
            for coder, frame in zip(coders, said):
                coder.encode(frame)
            ticks.append(time.perf_counter() - begin)
        times.append(sorted(ticks)[3])
    for guest in guests:
        engine.leave(guest)
    slots = max(1, sum(seconds <= enough for seconds in times))
    print(f"a frame takes {1000 * times[0]:.0f} ms for one conversation, "
          f"{1000 * times[slots - 1]:.0f} ms for {slots}, of 80 ms", flush=True)
    if times[0] > FRAME_SECONDS:
        print("this machine is slower than speech: even one conversation falls behind", flush=True)
    return slots


# --------------------------------------------------------------------------------------------------
# One conversation


class Session:
    """A client from its upgrade to its end. All of it runs on the event loop.

    A message in goes to `hear`, whole frames to the batch; what the batch made comes to `answer`,
    which puts messages into `out`, which `send_all` sends.
    """
    recorded = True  # with record=DIR

    def __init__(self, server, ws, transport, wishes):
        self.server, self.ws, self.transport, self.wishes = server, ws, transport, wishes
        self.ogg_in, self.decoder = OggReader(), OpusDecoder()
        self.ogg_out, self.encoder = OggWriter(), OpusEncoder()
        self.samples = np.zeros(0, np.float32)  # of a frame that is not whole yet
        self.early = []  # frames that came while there was no slot
        self.has_slot = False
        self.frames_in = self.frames_out = self.rubbish = 0
        self.last_audio, self.timer = time.monotonic(), None
        self.out, self.ended, self.drained = asyncio.Queue(), "", asyncio.Event()

    async def run(self):
        """Until one of both sides closes."""
        sender = asyncio.create_task(self.send_all())
        try:
            code = await self.listen()
            if self.timer:
                self.timer.cancel()
            if code == WSCloseCode.OK and (self.has_slot or self.early) and not self.ended:
                await self.drain()
        finally:
            self.server.release(self)
            self.ended = self.ended or "closed"
            self.out.put_nowait((WSCloseCode.OK, b""))
            await asyncio.wait([sender], timeout=2)
            if not sender.done():  # nobody fetches what is sent
                sender.cancel()
                self.transport.abort()

    async def listen(self):
        """Takes messages until the close, whose code it returns."""
        while True:
            message = await self.ws.receive()
            if message.type is WSMsgType.BINARY and not self.ended:
                self.hear(message.data)
            elif message.type in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.CLOSING,
                                  WSMsgType.ERROR):
                return self.ws.close_code

    def watch(self):
        """Ends it `idle` seconds after its last audio. A timer, since every pong would start a time
        limit of `receive` anew."""
        left = self.last_audio + self.server.cfg.idle - time.monotonic()
        if left > 0:
            self.timer = asyncio.get_running_loop().call_later(left, self.watch)
        else:
            self.end(f"no audio came for {self.server.cfg.idle:g} s", "idle")

    async def drain(self):
        """Waits until all frames are answered."""
        self.check_drained()
        try:
            await asyncio.wait_for(self.drained.wait(), DRAIN_SECONDS)
        except asyncio.TimeoutError:
            pass

    def check_drained(self):
        if self.frames_out == self.frames_in:
            self.drained.set()
        else:
            self.drained.clear()

    # -- in

    def hear(self, data):
        """One binary message of the client."""
        kind, body = (data[0], data[1:]) if data else (None, b"")
        if kind == SETTINGS and body.startswith(b"{") and not self.frames_in:
            return self.change_wishes(body)
        pcm = [np.zeros(0, np.float32)]
        if kind == OGG:
            pcm += [self.decoder.decode(packet) for packet in self.ogg_in.read(body)]
        elif kind == PACKETS:
            pcm += [self.decoder.decode(packet) for packet in split_packets(body)]
        elif kind == PCM:
            pcm.append(np.frombuffer(body[:len(body) & ~1], "<i2").astype(np.float32) / 32768)
        pcm = np.concatenate(pcm)
        if not len(pcm):
            self.rubbish += len(data)
            if self.rubbish > MOST_RUBBISH:
                self.end("too much came that is no audio", "rubbish", WSCloseCode.POLICY_VIOLATION)
            return
        self.last_audio = time.monotonic()
        self.samples = np.concatenate([self.samples, pcm])
        while len(self.samples) >= FRAME and not self.ended:
            self.take_frame(self.samples[:FRAME])
            self.samples = self.samples[FRAME:]

    def take_frame(self, frame):
        self.frames_in += 1
        if self.frames_in - self.frames_out > MOST_BEHIND:
            why = ("audio came much faster than it is answered" if self.has_slot else
                   f"more than {MOST_BEHIND * FRAME_SECONDS:.0f} s of audio came before a slot was "
                   "free")
            return self.end(why, "flood", WSCloseCode.POLICY_VIOLATION)
        if self.frames_in > self.server.limit:
            return
        event = ("frame", self, (frame, self.last_audio))
        self.server.batch.events.put(event) if self.has_slot else self.early.append(event)

    def change_wishes(self, body):
        """A first message of kind 03 with JSON: takes the place of the query."""
        try:
            given = json.loads(body)
            for name, value in given.items():
                if isinstance(value, (list, dict)):
                    raise BadParameter(name, "must be text or a number")
            given = {name: str(value) for name, value in given.items() if value is not None}
            self.wishes = read_wishes(given, self.server.engine.voices)
            self.server.engine.check(self.wishes)
        except (ValueError, AttributeError, RecursionError) as e:  # BadParameter is a ValueError
            return self.end(f"the settings cannot be read: {e}", "settings",
                            WSCloseCode.POLICY_VIOLATION)
        if self.has_slot:
            self.server.batch.events.put(("prepare", self, self.wishes))

    # -- out

    def begin(self):
        """A slot is there."""
        self.has_slot, self.last_audio = True, time.monotonic()
        self.put(HANDSHAKE)
        self.tell(event="begin", limit_frames=self.server.limit, **self.wishes)
        self.server.batch.events.put(("prepare", self, self.wishes))
        for event in self.early:
            self.server.batch.events.put(event)
        self.early = []
        if self.ws.close_code is None:  # else it only waits for what is to be answered
            self.watch()

    def answer(self, said, words):
        """One frame of the answer: said (1920,) in [-1, 1]; words: its (mark, text)."""
        if self.ended:
            return
        self.frames_out += 1
        for mark, text in words:
            if mark:
                self.tell(event="mark", mark=mark)
            if text:
                self.put(TEXT, text.encode())
        self.put_audio(said)
        if self.out.qsize() > MOST_BEHIND:
            self.ended = "stalled"  # it doesn't fetch what it asked for
            self.transport.abort()
        if self.frames_out >= self.server.limit:
            minutes = self.server.limit * FRAME_SECONDS / 60
            self.end(f"this conversation has reached its limit of {minutes:g} minutes", "limit")
        self.check_drained()

    def put_audio(self, said):
        if self.wishes["format"] == "pcm":
            pcm = (said * 32767).round().clip(-32768, 32767).astype("<i2")
            return self.put(PCM, pcm.tobytes())
        packets = self.encoder.encode(said)
        if self.wishes["format"] == "ogg":
            return self.put(OGG, self.ogg_out.write(packets))
        self.put(PACKETS, b"".join(struct.pack("<H", len(p)) + p for p in packets))

    def put(self, kind, body=b""):
        self.out.put_nowait(bytes([kind]) + body)

    def tell(self, **event):
        """An event, to a client that wants them."""
        if self.wishes["events"]:
            self.put(EVENT, json.dumps(event).encode())

    def end(self, why, reason, code=WSCloseCode.OK):
        """Says why, as the text that every client shows, and closes behind what is to be sent."""
        if self.ended:
            return
        self.ended = reason
        self.put(ERROR, why.encode())
        self.put(TEXT, f" [{why}]".encode())
        self.out.put_nowait((code, why.encode()[:120]))
        self.drained.set()

    async def send_all(self):
        """Sends `out`, up to the close (code, reason) in it."""
        try:
            while isinstance(message := await self.out.get(), bytes):
                await self.ws.send_bytes(message)
            await self.ws.close(code=message[0], message=message[1])
        except ConnectionError:  # it has gone; `listen` sees that too
            pass


def split_packets(body):
    """The packets of a message of kind 09."""
    packets = []
    while len(body) > 2:
        size = struct.unpack_from("<H", body)[0]
        packets.append(body[2:2 + size])
        body = body[2 + size:]
    return packets


# --------------------------------------------------------------------------------------------------
# All of them


class Metrics:
    """What /metrics shows."""

    def __init__(self, server):
        self.registry = registry = prometheus_client.CollectorRegistry()
        steps = (.005, .01, .02, .03, .04, .06, .08, .12, .16, .32, .64, 1.28, 5)

        def gauge(name, what, read=None):
            made = prometheus_client.Gauge(f"nanofactor_{name}", what, registry=registry)
            made.set_function(read) if read else None
            return made

        def histogram(name, what):
            return prometheus_client.Histogram(f"nanofactor_{name}_seconds", what, buckets=steps,
                                               registry=registry)
        gauge("sessions", "Conversations that have a slot", lambda: len(server.sessions))
        gauge("slots", "Conversations that may have one", lambda: server.slots)
        gauge("queue", "Clients that wait for a slot", lambda: len(server.queue))
        self.behind = gauge("frames_behind", "Frames that are heard and not yet answered")
        self.tick = histogram("tick", "One step of the model for all sessions that have a frame")
        self.latency = histogram("latency", "From a frame's last sample to the answer's sending")
        self.ends = prometheus_client.Counter("nanofactor_ends", "Conversations by their end",
                                              ["why"], registry=registry)


class Server:
    """The slots, the queue before them, and what HTTP asks."""

    def __init__(self, cfg, engine, slots):
        self.cfg, self.engine, self.slots = cfg, engine, slots
        self.limit = int(cfg.minutes * 60 / FRAME_SECONDS)  # frames of a conversation
        self.sessions, self.queue = set(), []  # with a slot; waiting for one, the first first
        self.metrics = Metrics(self)
        self.failure = None

    # -- the batch's thread and ours

    async def start(self, app):
        loop = asyncio.get_running_loop()

        def deliver(answers):
            loop.call_soon_threadsafe(self.deliver, answers)

        def failed(error):
            loop.call_soon_threadsafe(self.fail, error)
        self.batch = Batch(self.engine, deliver, failed, self.metrics)
        self.batch.start()

    def deliver(self, answers):
        """What one tick made: a list of (session, said, words, time when it was asked)."""
        for session, said, words, came in answers:
            session.answer(said, words)
            self.metrics.latency.observe(time.monotonic() - came)

    def fail(self, error):
        """The model's thread has ended; so does the server, for its keeper to start it again."""
        self.failure = error
        for session in [*self.sessions, *self.queue]:
            session.end("the model has stopped", "failure", WSCloseCode.INTERNAL_ERROR)
        asyncio.get_running_loop().call_later(0.5, self.stop)

    def stop(self):
        raise web.GracefulExit

    async def close_all(self, app):
        """At the end of the server."""
        for session in [*self.sessions, *self.queue]:
            session.end("the server is stopping", "stop", WSCloseCode.GOING_AWAY)
        for _ in range(30):
            await asyncio.sleep(0.1 if self.sessions else 0)
        self.batch.events.put(("end", None, None))
        await asyncio.get_running_loop().run_in_executor(None, self.batch.join, 10)

    # -- slots

    def enter(self, session):
        self.queue.append(session)
        self.fill_slots()
        if not session.has_slot:
            session.tell(event="queue", position=len(self.queue))

    def release(self, session):
        """Its slot, or its place in the queue, is the next one's."""
        if session in self.queue:
            self.queue.remove(session)
        elif session in self.sessions:
            self.sessions.remove(session)
            self.batch.events.put(("leave", session, None))
        self.metrics.ends.labels(session.ended or "closed").inc()
        self.fill_slots()
        for place, waiting in enumerate(self.queue):
            waiting.tell(event="queue", position=place + 1)

    def fill_slots(self):
        while self.queue and len(self.sessions) < self.slots:
            session = self.queue.pop(0)
            self.sessions.add(session)
            session.begin()

    def full(self):
        return len(self.sessions) >= self.slots and len(self.queue) >= self.cfg.queue

    # -- HTTP

    def refusal(self, request):
        """The answer to a request that may not become a conversation, or None."""
        origin, host = request.headers.get("Origin"), request.headers.get("Host")
        named = map(str.strip, self.cfg.origins.split(","))
        allowed = [f"http://{host}", f"https://{host}", *named]
        if origin and origin not in allowed:
            return problem(403, f"pages of {origin} may not connect", "Origin")
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        given = request.query.get("token", given)
        given, token = (text.encode(errors="surrogateescape") for text in (given, self.cfg.token))
        if token and not hmac.compare_digest(given, token):
            return problem(401, "the token is missing or wrong", "token")
        for name in request.query:
            if len(request.query.getall(name)) > 1:
                return problem(400, f"{name}: given twice", name)
        try:
            self.engine.check(read_wishes(request.query, self.engine.voices))
        except BadParameter as e:
            return problem(400, str(e), e.name)
        if self.full():
            return problem(503, f"all {self.slots} slots and the queue behind them are full; "
                           "try again in a moment", None,
                           {"Retry-After": "10"})
        return None

    async def chat(self, request):
        """GET /api/chat: the WebSocket."""
        if (refused := self.refusal(request)) is not None:
            return refused
        ws = web.WebSocketResponse(heartbeat=HEARTBEAT, autoclose=False, compress=False,
                                   max_msg_size=MOST_BYTES)
        if not ws.can_prepare(request):
            return problem(426, "this address is for WebSockets", None, {"Upgrade": "websocket"})
        await ws.prepare(request)
        wishes = read_wishes(request.query, self.engine.voices)
        session = Session(self, ws, request.transport, wishes)
        self.enter(session)
        await session.run()
        return ws

    async def check(self, request):
        """GET /api/check?...: what /api/chat?... would say before an upgrade, for pages, which
        cannot read that."""
        return self.refusal(request) or web.json_response({"ok": True})

    async def voices(self, request):
        """GET /api/voices: what the page needs for its form."""
        return web.json_response({"voices": self.engine.voices, "defaults": DEFAULTS,
                                  "limits": LIMITS, "limit_frames": self.limit})

    async def health(self, request):
        """GET /health: for whoever shares out clients over servers."""
        free = max(0, self.slots - len(self.sessions) - len(self.queue))
        state = {"status": "failed" if self.failure else "ok", "slots": self.slots, "free": free,
                 "sessions": len(self.sessions), "queue": len(self.queue),
                 "limit_frames": self.limit}
        return web.json_response(state, status=500 if self.failure else 200)

    async def show_metrics(self, request):
        """GET /metrics: for Prometheus."""
        text = prometheus_client.generate_latest(self.metrics.registry)
        kind = prometheus_client.CONTENT_TYPE_LATEST
        return web.Response(body=text, headers={"Content-Type": kind})

    async def page(self, request):
        """GET /: web/index.html."""
        policy = ("default-src 'none'; script-src 'unsafe-inline' blob:; worker-src blob:; "
                  "style-src 'unsafe-inline'; connect-src 'self' ws: wss:; media-src blob:; "
                  "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
        return web.FileResponse(Path(__file__).parent / "web" / "index.html",
                                headers={"Content-Security-Policy": policy})


def problem(status, what, parameter, headers=None):
    """An error's answer: JSON that says what is wrong, and with which parameter."""
    return web.json_response({"error": what, "parameter": parameter}, status=status,
                             headers=headers)


SERVER = web.AppKey("server", Server)


def make_app(cfg, engine, slots):
    """The aiohttp application around an engine (Echo or Talk) that keeps up with `slots`."""
    server, app = Server(cfg, engine, slots), web.Application(client_max_size=MOST_BYTES)
    app.add_routes([web.get("/api/chat", server.chat), web.get("/api/check", server.check),
                    web.get("/api/voices", server.voices), web.get("/health", server.health),
                    web.get("/metrics", server.show_metrics), web.get("/", server.page)])
    app[SERVER] = server
    app.on_startup.append(server.start)
    app.on_shutdown.append(server.close_all)
    return app


# --------------------------------------------------------------------------------------------------
# The start


def tls_context(cfg):
    """The context of ssl=true: the certificate of the folder, made now if there is none.
    Raises InputError rather than go on without."""
    folder = Path(cfg.certificate)
    cert, key = folder / "cert.pem", folder / "key.pem"
    if not cert.exists() and not key.exists():
        make_certificate(cert, key, cfg.host)
        print(f"{cert}: made; browsers warn of it once, since nobody else has signed it")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as e:
        raise InputError(f"{folder}: cert.pem and key.pem cannot be used ({e}); give a folder with "
                         "both, or with neither, to have them made") from e
    return context


def make_certificate(cert, key, host):
    """Writes a self-signed certificate for this machine, of two years, and its key."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as e:
        raise InputError("ssl=true needs a certificate, and to make one the package cryptography: "
                         "python -m pip install cryptography") from e
    import datetime
    made = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "nanoFActor")])
    now = datetime.datetime.now(datetime.timezone.utc)
    names = []
    for own in dict.fromkeys(["localhost", socket.gethostname(), "127.0.0.1", "::1", host]):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(own)))
        except ValueError:  # a name; a certificate takes ASCII
            names += [x509.DNSName(own)] if own.isascii() and own else []
    signed = (x509.CertificateBuilder().subject_name(name).issuer_name(name)
              .public_key(made.public_key()).serial_number(x509.random_serial_number())
              .not_valid_before(now - datetime.timedelta(days=1))
              .not_valid_after(now + datetime.timedelta(days=730))
              .add_extension(x509.SubjectAlternativeName(names), critical=False)
              .sign(made, hashes.SHA256()))
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    try:
        cert.parent.mkdir(parents=True, exist_ok=True)
        key.touch(mode=0o600)
        key.write_bytes(made.private_bytes(encoding, form, serialization.NoEncryption()))
        cert.write_bytes(signed.public_bytes(encoding))
    except OSError as e:
        raise InputError(f"{cert.parent}: no certificate can be written there ({e}); give another "
                         "folder with certificate=") from e


def check_settings(cfg):
    """Raises InputError."""
    if cfg.mode not in ("talk", "echo"):
        raise InputError(f"mode is '{cfg.mode}'; use talk or echo")
    if not 0 < cfg.port < 65536:
        raise InputError(f"port={cfg.port}: a port is 1..65535")
    if min(cfg.slots, cfg.queue, cfg.slow) < 0 or min(cfg.minutes, cfg.idle, cfg.most_slots) <= 0:
        raise InputError("slots, queue and slow are at least 0; minutes, idle and most_slots more")
    if not cfg.minutes <= 1e6:  # nan neither
        raise InputError(f"minutes={cfg.minutes}: must be at most 1000000, two years")
    if cfg.slow and cfg.mode != "echo" or cfg.record and cfg.mode != "talk":
        raise InputError("slow= is for mode=echo, record= for mode=talk")
    make_folder(cfg.record)


def main(argv):
    cfg = load_settings(Config, argv)
    check_settings(cfg)
    context = tls_context(cfg) if cfg.ssl else None
    engine = Talk(cfg) if cfg.mode == "talk" else Echo(cfg)
    slots = cfg.slots or (measure_slots(engine, cfg.most_slots) if cfg.mode == "talk" else 16)
    app = make_app(cfg, engine, slots)
    kind = "https" if cfg.ssl else "http"
    print(f"{slots} conversations at a time; open {kind}://{cfg.host}:{cfg.port}", flush=True)
    if cfg.host == "localhost":
        print(f"from another machine: ssh -L {cfg.port}:localhost:{cfg.port} THIS_MACHINE, then "
              "the same address there", flush=True)
    try:
        web.run_app(app, host=cfg.host, port=cfg.port, ssl_context=context, print=None,
                    access_log=None)
    except OSError as e:
        raise InputError(f"{cfg.host}:{cfg.port} cannot be listened on ({e.strerror}); give "
                         "another port=") from e
    if app[SERVER].failure:
        raise app[SERVER].failure


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as e:
        sys.exit(f"serve.py: {e}")
