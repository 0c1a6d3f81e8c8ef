"""Streams a recording, or the microphone, to a server (serve.py's, or Moshi's); saves the answer.

    python talk.py FILE.wav                      -> answer.wav, as long as FILE.wav
    python talk.py FILE.wav url=wss://host:8998/api/chat voice=NAME narrative="You have lost a dog."
    python talk.py                               the microphone, until Ctrl-C (needs sounddevice)

The answer is placed as it would have been heard: what the server says after hearing frame k lies at
frame k + 1 (Moshi's says nothing to frame 0). `stereo=true` writes the recording beside it. Words
are printed as they come.
"""
import asyncio
import functools
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import numpy as np

from codec import audio_kind, read_audio, write_audio
from config import InputError, load_settings, make_folder
from ogg import FRAME, FRAME_SECONDS, RATE, OggReader, OggWriter, OpusDecoder, OpusEncoder

try:
    import aiohttp
except ImportError:
    sys.exit("talk.py: aiohttp is missing; python -m pip install -r requirements-live.txt")

HANDSHAKE, OGG, TEXT, ERROR = 0, 1, 2, 5  # kinds of messages, as in serve.py
AHEAD = 50  # frames that may be unanswered with pace=false
LAST_WAIT = 2.0  # seconds without an answer after which the last ones are given up


@dataclass
class Config:
    url: str = "ws://localhost:8998/api/chat"
    out: str = "answer.wav"  # .wav or .flac
    stereo: bool = False  # the answer left, what was said to it right
    listen: float = 0.0  # seconds of silence sent after the recording
    pace: bool = True  # as fast as it was spoken; false: as fast as the server answers
    insecure: bool = False  # takes a certificate that nobody has signed (serve.py ssl=true)
    # what serve.py understands; what is empty is not sent
    voice: str = ""
    name: str = ""
    other: str = ""
    narrative: str = ""
    backchannels: str = ""
    interruptions: str = ""
    starts: str = ""
    seed: str = ""
    token: str = ""


WISHES = ("voice", "name", "other", "narrative", "backchannels", "interruptions", "starts", "seed",
          "token")


class Answer:
    """What the server has said: `frames` of (1920,), in order, when each was asked for and came
    (`sent_at`, `came_at`, in seconds of the clock), to how many frames at the start it said
    nothing (`late`), and why it closed, if it did."""

    def __init__(self):
        self.frames, self.samples, self.problem = [], np.zeros(0, np.float32), ""
        self.sent_at, self.came_at, self.late = [], [], 0
        self.reader, self.decoder = OggReader(), OpusDecoder()
        self.begun, self.came = asyncio.Event(), asyncio.Event()

    async def listen(self, ws, play=None, show=None):
        """Takes all messages until the server closes. play(frame) and show(text) get what comes."""
        async for message in ws:
            kind, body = message.data[0], message.data[1:]
            if kind == HANDSHAKE:
                self.begun.set()
            elif kind == TEXT and show:
                show(body.decode())
            elif kind == ERROR:
                self.problem = body.decode()
            elif kind == OGG:
                new = map(self.decoder.decode, self.reader.read(body))
                self.samples = np.concatenate([self.samples, *new])
                while len(self.samples) >= FRAME:
                    self.frames.append(self.samples[:FRAME])
                    self.came_at.append(time.monotonic())
                    self.samples = self.samples[FRAME:]
                    if play:
                        play(self.frames[-1])
                self.came.set()
        if ws.close_code not in (None, 1000) and not self.problem:
            self.problem = f"the connection broke (code {ws.close_code})"
        self.begun.set()
        self.came.set()

    def waits(self):
        """Seconds from the sending of each frame to its answer, (n,)."""
        return np.array([came - sent for came, sent in zip(self.came_at, self.sent_at[self.late:])])

    async def wait_for(self, number, ws, patience=None):
        """Until so many frames have come, nothing has for `patience` seconds, or the server has
        closed."""
        while len(self.frames) < number and not ws.closed:
            self.came.clear()
            try:
                await asyncio.wait_for(self.came.wait(), patience)
            except asyncio.TimeoutError:
                return


async def send_recording(ws, frames, answer, pace):
    """Frames (n, 1920), each at its time by the clock (pace), then waits for the last answer, but
    not for ever: Moshi's server gives N - 1 to N frames."""
    encoder, writer = OpusEncoder(), OggWriter()
    start = time.monotonic()
    for number, frame in enumerate(frames):
        if pace:
            await asyncio.sleep(max(0, start + (number + 1) * FRAME_SECONDS - time.monotonic()))
        else:
            await answer.wait_for(number + 1 - AHEAD, ws)
        if ws.closed:
            return
        message = bytes([OGG]) + writer.write(encoder.encode(frame))
        answer.sent_at.append(time.monotonic())
        try:
            await ws.send_bytes(message)
        except ConnectionError:  # it has gone; `listen` says so
            return
    await answer.wait_for(len(frames), ws, LAST_WAIT)
    missing = len(frames) - len(answer.frames)
    if missing > 0 and not ws.closed:
        answer.problem = f"it has not answered {missing} of {len(frames)} frames"
        if missing == 1:
            answer.late = 1
            answer.problem += ", the first, as Moshi's does; its answer is placed 80 ms later"


async def send_microphone(ws, sound, frames):
    """The microphone's frames, which are kept in `frames`, until Ctrl-C or the server's close."""
    encoder, writer = OpusEncoder(), OggWriter()
    heard, loop = asyncio.Queue(), asyncio.get_running_loop()

    def take(data, *_):
        loop.call_soon_threadsafe(heard.put_nowait, data[:, 0].copy())
    try:
        with sound.InputStream(RATE, FRAME, channels=1, dtype="float32", callback=take):
            while not ws.closed:
                frames.append(await heard.get())
                await ws.send_bytes(bytes([OGG]) + writer.write(encoder.encode(frames[-1])))
    except ConnectionError:  # the server has ended it; `listen` says why
        pass
    except asyncio.CancelledError:  # Ctrl-C: what was said so far is saved
        asyncio.current_task().uncancel()


async def talk(cfg, frames):
    """frames (n, 1920), or None for the microphone -> (frames said to it, Answer).
    Raises InputError if the server refuses."""
    query = urlencode({name: getattr(cfg, name) for name in WISHES if getattr(cfg, name)})
    answer, sound, player = Answer(), None, None
    if frames is None:
        sound, frames = open_sound(), []
        player = sound.OutputStream(RATE, FRAME, channels=1, dtype="float32")
        player.start()
        print("speak; Ctrl-C ends it (headphones, or it hears itself)")
    play = (lambda frame: player.write(frame[:, None])) if player else None
    async with aiohttp.ClientSession() as http:
        url = f"{cfg.url}?{query}"
        check = not cfg.insecure
        await explain_refusal(http, url, check)
        try:
            ws = await http.ws_connect(url, ssl=check, max_msg_size=0)
        except aiohttp.WSServerHandshakeError as e:
            raise InputError(f"{cfg.url}: no conversation begins there (status {e.status}); give "
                             f"the whole address, like {Config.url}") from e
        async with ws:
            show = functools.partial(print, end="", flush=True)
            listening = asyncio.create_task(answer.listen(ws, play, show))
            if sound:
                await send_microphone(ws, sound, frames)
            else:
                await answer.begun.wait()
                await send_recording(ws, frames, answer, cfg.pace)
            await ws.close()
            await listening
    if answer.problem:
        print(f"\ntalk.py: the server: {answer.problem}", file=sys.stderr)
    return np.array(frames).reshape(-1, FRAME), answer


async def explain_refusal(http, url, check):
    """Raises InputError with what the server has against the query; nothing if it has nothing, or
    is not one of ours."""
    asked, error = re.sub("^ws", "http", url).replace("/api/chat", "/api/check"), None
    try:
        async with http.get(asked, ssl=check) as response:
            if response.status in (400, 401, 403, 503):
                error = (await response.json())["error"]
    except aiohttp.ClientConnectorCertificateError as e:
        raise InputError(f"{url}: nobody has signed its certificate; insecure=true takes it") from e
    except (aiohttp.ClientError, ValueError) as e:
        raise InputError(f"{url}: cannot be reached ({e}); is serve.py running there?") from e
    if error:
        raise InputError(f"the server refuses: {error}")


def open_sound():
    try:
        import sounddevice
    except (ImportError, OSError) as e:  # OSError: no PortAudio
        raise InputError(f"the microphone needs sounddevice and PortAudio ({e}); or give a "
                         "recording: python talk.py FILE.wav") from e
    return sounddevice


def main(argv):
    files = []
    cfg = load_settings(Config, argv, files)
    if len(files) > 1:
        raise InputError(f"one recording at a time, not {len(files)}")
    if not 0 <= cfg.listen <= 3600:  # nan neither
        raise InputError(f"listen={cfg.listen}: seconds of silence after the recording, 0..3600")
    audio_kind(cfg.out)  # now, not after the talk
    make_folder(Path(cfg.out).parent)
    frames, size = None, None
    if files:
        audio = read_audio(files[0], sample_rate=RATE).mean(0).numpy()  # (samples,)
        size = len(audio) + int(cfg.listen * RATE)
        frames = np.pad(audio, (0, size + -size % FRAME - len(audio))).reshape(-1, FRAME)
    said, answered = asyncio.run(talk(cfg, frames))
    size = size or said.size
    answer = np.concatenate([np.zeros(FRAME * (1 + answered.late)), *answered.frames])[:size]
    answer = np.pad(answer, (0, size - len(answer)))
    channels = [answer, said.ravel()[:size]] if cfg.stereo else [answer]
    write_audio(Path(cfg.out), np.stack(channels), RATE)
    print(f"\n{cfg.out}: {size / RATE:.2f} s, {len(answered.frames)} frames for {len(said)}")
    if cfg.pace and len(waits := answered.waits() * 1000):
        print(f"an answer came {np.median(waits):.0f} ms after its frame was sent, at worst "
              f"{waits.max():.0f} ms")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as e:
        sys.exit(f"talk.py: {e}")
