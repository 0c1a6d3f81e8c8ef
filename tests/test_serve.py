"""serve.py by its echo mode, with clients as the field's are. No model, loopback only."""
import asyncio
import itertools
import json
import struct
import sys
from concurrent.futures import BrokenExecutor, Future
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("sphn", reason="needs requirements-live.txt")
websockets = pytest.importorskip("websockets", reason="needs requirements-live.txt")
test_utils = pytest.importorskip("aiohttp.test_utils", reason="needs requirements-live.txt")

import ogg  # noqa: E402  behind what they need
import serve  # noqa: E402
from ogg import FRAME, RATE  # noqa: E402


def run(client, **settings):
    """`await client(server)` against an echo server in this process: (its address, its Server)."""
    async def both():
        cfg = serve.Config(mode="echo", **settings)
        app = serve.make_app(cfg, serve.Echo(cfg), cfg.slots or 4)
        async with test_utils.TestServer(app) as server:
            return await client(f"ws://127.0.0.1:{server.port}/api/chat", app[serve.SERVER])
    return asyncio.run(asyncio.wait_for(both(), 120))


def connect(address, close_timeout=60, **query):
    address += "?" + "&".join(f"{key}={value}" for key, value in query.items())
    return websockets.connect(address, close_timeout=close_timeout)


async def everything(client):
    """All messages until the server closes, whatever the code."""
    received = []
    try:
        while True:
            received.append(await client.recv())
    except websockets.ConnectionClosed:
        return received


def beeps():
    """6.03 s at 24 kHz with 10 ms of 1 kHz at 1, 2, ... 5 s."""
    audio = np.zeros(144720, np.float32)
    for second in range(1, 6):
        audio[second * RATE:second * RATE + 240] = 0.5 * np.sin(np.arange(240) * 2 * np.pi / 24)
    return audio


def in_frames(audio):
    return np.pad(audio, (0, -len(audio) % FRAME)).reshape(-1, FRAME)


def pages(audio, layout="bench"):
    """`audio` as messages of a client: bench (head, tags, then a page per frame), web (two 20 ms
    packets per page), v2 (one), whole (headers and all audio in the first messages together), cut
    (pages in pieces)."""
    encoder, number = ogg.OpusEncoder(), itertools.count()
    size = {"web": 2, "v2": 1}.get(layout, 4)
    writer = ogg.OggWriter()
    head = writer.headers()
    second = head.index(b"OggS", 4)
    made = [head[:second], head[second:]]
    next(number), next(number)
    for frame in in_frames(audio):
        packets = encoder.encode(frame)
        for i in range(0, len(packets), size):
            writer.granule += 480 * size * 2
            made.append(ogg.ogg_page(packets[i:i + size], 0, writer.granule, writer.serial,
                                       next(number)))
    if layout == "whole":
        made = [b"".join(made[:10]), *made[10:]]
    if layout == "cut":
        stream = b"".join(made)
        made = [stream[i:i + 100] for i in range(0, len(stream), 100)]
    return [b"\x01" + page for page in made]


def test_opus_packets_of_one_byte_are_silence():
    assert [ogg.opus_samples(bytes([toc])) for toc in (0x78, 0xF8, 0x68)] == [480, 480, 480]
    assert [ogg.opus_samples(packet) for packet in (b"", b"\x02", b"\x03")] == [0, 0, 0]


def test_a_packet_whose_begin_is_lost_is_left_out():
    """Packets over two pages; the page with the first's begin, or the one with its end, is lost."""
    def page(lacing, body, flags, number):
        head = struct.pack("<4sBBqIIIB", b"OggS", 0, flags, 0, 7, number, 0, len(lacing))
        whole = head + bytes(lacing) + body
        return whole[:22] + struct.pack("<I", ogg.ogg_crc(whole)) + whole[26:]
    first = page([3], b"one", 2, 0)
    begin, end = page([255], b"a" * 255, 0, 1), page([4, 5], b"tailwhole", 1, 2)
    assert ogg.OggReader().read(first + begin + end) == [b"one", b"a" * 255 + b"tail", b"whole"]
    assert ogg.OggReader().read(first + end) == [b"one", b"whole"]
    broken = begin[:-1] + b"b"
    assert ogg.OggReader().read(first + broken + end) == [b"one", b"whole"]
    late = page([4, 5], b"tailwhole", 1, 3)
    assert ogg.OggReader().read(first + begin + late) == [b"one", b"whole"]


def test_a_recording_names_the_sampling_that_was_used():
    wishes = dict.fromkeys(("text_temperature", "audio_temperature", "text_topk", "audio_topk"))
    talk = SimpleNamespace(sampling={"top_k": 0, "word_temperature": 0.4})
    assert serve.Talk.sampling_for(talk, wishes) == talk.sampling
    found = serve.Talk.sampling_for(talk, wishes | {"text_temperature": 0.7, "audio_topk": 5})
    assert found == {"top_k": 0, "word_temperature": 0.7, "decision_temperature": 0.7,
                     "audio_top_k": 5}


async def speak(address, messages, **query):
    """Sends the messages, closes with 1000 and keeps what comes until the end: (kinds, samples)."""
    reader, decoder = ogg.OggReader(), ogg.OpusDecoder()
    async with connect(address, **query) as client:
        listening = asyncio.create_task(everything(client))
        for message in messages:
            await client.send(message)
            await asyncio.sleep(0)
        await client.close()
        received = await listening
    packets = reader.read(b"".join(m[1:] for m in received if m[0] == serve.OGG))
    return [m[0] for m in received], np.concatenate([np.zeros(0), *map(decoder.decode, packets)])


def lag(heard, said):
    """Milliseconds by which `heard` follows `said`."""
    size = 1 << 19
    both = np.fft.irfft(np.fft.rfft(heard, size) * np.fft.rfft(said, size).conj())
    return np.argmax(both[:RATE]) / RATE * 1000


@pytest.mark.parametrize("slow", [0.0, 0.02])
def test_alignment(slow, monkeypatch):
    """What Full-Duplex-Bench's client does, too late by two messages and closing at once; the
    backlog is answered before the close."""
    monkeypatch.setattr(serve, "DRAIN_SECONDS", 60)  # for slow machines
    sent = pages(beeps())
    kinds, pcm = run(lambda address, _: speak(address, sent[:77]), slow=slow)
    assert len(sent) == 78 and kinds[0] == serve.HANDSHAKE
    assert kinds.count(serve.OGG) == 75  # 77 messages are 75 frames
    pcm = np.concatenate([np.zeros(FRAME), pcm])[:144720]  # its rule: a frame of zeros in front
    pcm = np.pad(pcm, (0, 144720 - len(pcm)))
    assert abs(lag(pcm, beeps()) - 92.9) < 0.2


@pytest.mark.parametrize("layout", ["web", "v2", "whole", "cut"])
def test_layouts_of_ogg(layout):
    audio = beeps()[:RATE * 2]
    _, pcm = run(lambda address, _: speak(address, pages(audio, layout)))
    assert len(pcm) == len(in_frames(audio)) * FRAME
    assert abs(lag(pcm, audio) - 12.9) < 0.2


def test_a_client_may_begin_a_new_stream_and_send_rests_of_the_old():
    first, second = pages(beeps()[:FRAME * 5]), pages(beeps()[:FRAME * 6])
    rest = [first[-1], first[3]]  # of a stream that has been left; and headers each in a message
    _, pcm = run(lambda address, _: speak(address, [*first, *second[:4], *rest, *second[4:]]))
    assert len(pcm) == 11 * FRAME


def test_pings_are_answered_while_the_model_works():
    async def client(address, server):
        async with connect(address) as ws:
            await ws.send(b"\x08" + bytes(2 * FRAME))
            return await asyncio.wait_for(await ws.ping(), 1)  # the tick takes 2 s
    assert run(client, slow=2.0) < 1


@pytest.mark.parametrize("slow, slots, said", [(0.005, 2, "of 80 ms"), (0.09, 1, "falls behind")])
def test_slots_are_measured(slow, slots, said, capsys):
    assert serve.measure_slots(serve.Echo(serve.Config(slow=slow)), 2) == slots
    assert said in capsys.readouterr().out


def test_a_message_may_not_be_too_large():
    async def client(address, server):
        async with connect(address) as ws:
            await ws.send(b"\x08" + bytes(serve.MOST_BYTES))
            await ws.wait_closed()
            return ws.close_code
    assert run(client) == 1009


def test_output_works_everywhere():
    """BOS first, then tags, audio from page 2; one serial, right sums, whole pages, 20 ms."""
    messages = []

    async def client(address, _):
        async with connect(address) as ws:
            for message in pages(beeps()[:FRAME * 3]):
                await ws.send(message)
            for _ in range(4):
                messages.append(await ws.recv())
    run(client)
    assert messages[0] == b"\x00" and all(m[0] == 1 for m in messages[1:])
    at, stream, found = 0, b"".join(m[1:] for m in messages[1:]), []
    while at < len(stream):
        head = struct.unpack_from("<4sBBqIIIB", stream, at)
        lacing = stream[at + 27:at + 27 + head[7]]
        page = stream[at:at + 27 + len(lacing) + sum(lacing)]
        assert head[0] == b"OggS" and ogg.ogg_crc(page[:22] + bytes(4) + page[26:]) == head[6]
        found.append((head[2], head[3], head[5], len(lacing), head[4]))
        at += len(page)
    assert [f[:3] for f in found] == [(2, 0, 0), (0, 0, 1), (0, 3840, 2), (0, 7680, 3),
                                      (0, 11520, 4)]
    assert [f[3] for f in found] == [1, 1, 4, 4, 4] and len({f[4] for f in found}) == 1
    assert messages[1].count(b"OggS") == 3  # the headers with the first audio


def test_our_formats():
    frames = in_frames(beeps()[:FRAME * 20])

    async def client(address, form):
        async with connect(address, format=form, events="true") as ws:
            encoder, decoder, pcm, events = ogg.OpusEncoder(), ogg.OpusDecoder(), [], []
            for frame in frames:
                if form == "pcm":
                    await ws.send(b"\x08" + (frame * 32767).astype("<i2").tobytes())
                else:
                    packets = [struct.pack("<H", len(p)) + p for p in encoder.encode(frame)]
                    await ws.send(b"\x09" + b"".join(packets))
            while len(pcm) < len(frames):
                message = await ws.recv()
                if message[0] == serve.EVENT:
                    events.append(json.loads(message[1:]))
                elif message[0] == serve.PCM:
                    pcm.append(np.frombuffer(message[1:], "<i2") / 32767)
                elif message[0] == serve.PACKETS:
                    pcm.append(np.concatenate([decoder.decode(p) for p in
                                               serve.split_packets(message[1:])]))
            return np.concatenate(pcm), events
    pcm, events = run(lambda address, _: client(address, "pcm"))
    assert np.abs(pcm - frames.ravel()).max() < 1e-3
    assert events[0]["event"] == "begin" and events[0]["limit_frames"] == 22500
    pcm, _ = run(lambda address, _: client(address, "opus"))
    assert abs(lag(pcm, frames.ravel()) - 12.9) < 0.2


@pytest.mark.parametrize("query, name, status", [
    ("seed=x", "seed", 400), ("text_temperature=nan", "text_temperature", 400),
    ("audio_topk=-1", "audio_topk", 400), ("voice_prompt=../../etc/passwd", "voice_prompt", 400),
    ("starts=perhaps", "starts", 400), ("narativ=x", "narativ", 400),
    ("seed=1&seed=2", "seed", 400),
    ("text_prompt=" + "x" * 1001, "text_prompt", 400), ("format=mp3", "format", 400),
    ("backchannels=1e9", "backchannels", 400), ("seed=1&token=wrong", "token", 401)])
def test_wrong_parameters_are_named(query, name, status):
    async def client(address, server):
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(f"{address}?{query}")
        return refused.value.response
    response = run(client, token="secret" if status == 401 else "")
    assert response.status_code == status and json.loads(response.body)["parameter"] == name


def test_what_stock_clients_send_is_understood():
    voices = ["a", "b"]
    moshi = ("text_temperature=0.7&text_topk=25&audio_temperature=0.8&audio_topk=250&pad_mult=0&"
             "text_seed=7&audio_seed=8&repetition_penalty_context=64&repetition_penalty=1.0")
    wishes = serve.read_wishes(dict(pair.split("=") for pair in moshi.split("&")), voices)
    assert (wishes["seed"], wishes["audio_topk"], wishes["text_temperature"]) == (7, 250, 0.7)
    wishes = serve.read_wishes({"text_prompt": "<system> You enjoy having a good conversation. "
                                "<system>", "voice_prompt": "NATF1.pt"}, voices)
    assert wishes["narrative"] == "You enjoy having a good conversation." and wishes["voice"] == "b"
    assert serve.read_wishes({"text_prompt": ""}, voices)["narrative"]


def test_settings_as_a_first_message():
    async def client(address, server):
        async with connect(address, events="true") as ws:
            await ws.send(b'\x03{"text_prompt": "Be kind.", "seed": 5, "format": "pcm", '
                          b'"text_temperature": null}')
            await ws.send(b"\x08" + bytes(2 * FRAME))
            kinds = [(await ws.recv())[0] for _ in range(3)]
            (session,) = server.sessions
            wishes = session.wishes
        codes = []
        for wrong in (b'{"seed": "x"}', b'{"name": ["a"]}'):
            async with connect(address) as ws:
                await ws.send(b"\x03" + wrong)
                await ws.wait_closed()
                codes.append(ws.close_code)
        return kinds, wishes, codes
    kinds, wishes, codes = run(client)
    assert kinds == [serve.HANDSHAKE, serve.EVENT, serve.PCM] and codes == [1008, 1008]
    assert (wishes["narrative"], wishes["seed"]) == ("Be kind.", 5)


def test_others_hear_the_same_beside_faulty_clients(monkeypatch):
    """Rubbish, half a page, vanishing, a stall and a flood beside a good client."""
    monkeypatch.setattr(serve, "DRAIN_SECONDS", 60)
    good = pages(beeps()[:RATE * 2])

    async def faulty(address, messages, vanish=False):
        async with connect(address, close_timeout=0.5) as ws:
            for message in messages:
                await ws.send(message)
            if vanish:
                ws.transport.abort()
                return
            await asyncio.sleep(0.2)

    async def client(address, server):
        alone = await speak(address, good)
        rng = np.random.default_rng(0)
        rubbish = [b"", b"\x01", b"\x01OggS", b"\xff" * 50, b"\x03\x00", b"\x09\xff\xff\x01",
                   b"\x08\x00", b"\x01" + rng.bytes(3000), b"\x01" + b"OggS" * 2000]
        torn = [page[:len(page) // 2] for page in good]
        flood = [b"\x08" + bytes(60000)] * 60
        others = [faulty(address, rubbish), faulty(address, torn),
                  faulty(address, good[:9], vanish=True)]
        beside, *_ = await asyncio.gather(speak(address, good), *others, return_exceptions=True)
        await asyncio.gather(faulty(address, flood), return_exceptions=True)
        for _ in range(400):  # at most 8 s
            if not server.sessions:
                break
            await asyncio.sleep(0.02)
        assert not server.sessions and not server.queue  # all slots are free again
        return alone, beside
    (kinds, alone), (kinds_beside, beside) = run(client)
    assert kinds == kinds_beside and kinds.count(serve.OGG) == 25
    assert np.array_equal(alone, beside)


def test_queue_and_503():
    async def client(address, server):
        http = address.replace("ws:", "http:").removesuffix("/api/chat")
        frame = b"\x08" + bytes(2 * FRAME)
        async with connect(address) as first:
            assert await first.recv() == b"\x00"
            second = await connect(address, format="pcm")
            await second.send(frame)  # before its handshake, and not lost
            third = await connect(address, events="true")
            assert json.loads((await third.recv())[1:]) == {"event": "queue", "position": 2}
            with pytest.raises(websockets.InvalidStatus) as refused:
                await connect(address)
            response = refused.value.response
            assert response.status_code == 503 and int(response.headers["Retry-After"]) > 0
            health = await get(http + "/health")
            assert (health["slots"], health["free"], health["queue"]) == (1, 0, 2)
        assert [(await second.recv())[0] for _ in range(2)] == [serve.HANDSHAKE, serve.PCM]
        assert json.loads((await third.recv())[1:])["position"] == 1
        await second.close()
        assert await third.recv() == b"\x00"
        await third.close()
        return await get(http + "/metrics", text=True)
    text = run(client, slots=1, queue=2)
    assert "nanofactor_slots 1.0" in text and 'nanofactor_ends_total{why="closed"}' in text
    assert "nanofactor_latency_seconds_count 1.0" in text


def test_who_closes_in_the_queue_is_answered():
    """A slot is free soon after the close: all its frames are answered, but not for other codes;
    and who sends too much while it waits is told so."""
    async def client(address, server):
        frame = b"\x08" + bytes(2 * FRAME)
        async with connect(address) as first:
            await first.recv()
            waiting = [await connect(address, format="pcm") for _ in range(3)]
            hearing = [asyncio.create_task(everything(ws)) for ws in waiting]
            for ws in waiting[:2]:
                for _ in range(20):
                    await ws.send(frame)
            for _ in range(serve.MOST_BEHIND + 1):
                await waiting[2].send(frame)
            closing = [asyncio.create_task(ws.close(code))
                       for ws, code in zip(waiting, (1000, 1001))]
            flooded = await hearing[2]
            await asyncio.sleep(0.3)
            assert not server.queue[0].has_slot
            server.cfg.idle = 0.2  # ends nobody who has closed
        await asyncio.gather(*closing)
        return [[m[0] for m in await task] for task in hearing[:2]], flooded
    (answered, unanswered), flooded = run(client, slots=1, queue=3, slow=0.02)
    assert answered == [serve.HANDSHAKE] + [serve.PCM] * 20 and not unanswered
    assert b"more than 60 s of audio came before a slot was free" in flooded[-1]


async def get(url, text=False, **headers):
    async with test_utils.ClientSession() as http, http.get(url, headers=headers) as response:
        return await (response.text() if text else response.json())


def test_the_limit_is_announced_and_ends_with_a_text():
    async def client(address, server):
        async with connect(address, format="pcm") as ws:
            await ws.send(b"\x08" + bytes(2 * FRAME * 8))
            return await everything(ws), ws.close_code
    received, code = run(client, minutes=5 * 0.08 / 60)
    assert [m[0] for m in received] == [0, 8, 8, 8, 8, 8, 5, 2] and code == 1000
    assert b"limit" in received[-1]


def test_a_silent_client_loses_its_slot():
    async def client(address, server):
        async with connect(address) as ws:
            return await everything(ws), len(server.sessions)
    received, left = run(client, idle=0.2)
    assert b"no audio" in received[-1] and left == 0


def test_a_silent_client_loses_its_slot_though_it_answers_pings(monkeypatch):
    """So does one that had to wait for its slot."""
    monkeypatch.setattr(serve, "HEARTBEAT", 0.1)

    async def client(address, server):
        async with connect(address) as first, connect(address) as second:
            assert await first.recv() == b"\x00" and server.queue
            return [(await asyncio.wait_for(everything(ws), 10))[-1] for ws in (first, second)]
    assert all(b"no audio came for 0.5 s" in last for last in run(client, idle=0.5, slots=1))


def test_pages_of_other_sites_may_not_connect():
    async def client(address, server):
        http = address.replace("ws:", "http:").replace("chat", "check")
        mine = http.removesuffix("/api/check")
        return [await get(http, Origin=origin) for origin in
                ("http://evil.example", mine, "http://friend.example")]
    answers = run(client, origins="http://friend.example")
    assert answers[0]["parameter"] == "Origin" and answers[1:] == [{"ok": True}] * 2


def test_ssl_makes_a_certificate_or_refuses(tmp_path, monkeypatch):
    cfg = serve.Config(ssl=True, certificate=str(tmp_path / "tls"))
    assert serve.tls_context(cfg).cert_store_stats() is not None
    assert (tmp_path / "tls" / "key.pem").stat().st_mode & 0o77 == 0
    (tmp_path / "tls" / "cert.pem").write_text("rubbish")
    with pytest.raises(serve.InputError, match="cannot be used"):
        serve.tls_context(cfg)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(serve.InputError, match="pip install cryptography"):
        serve.tls_context(serve.Config(ssl=True, certificate=str(tmp_path / "other")))


@pytest.mark.parametrize("host", ["10.0.0", "talk.example", "192.0.2.7", "fe80::1"])
def test_the_certificate_is_for_the_host_whatever_it_looks_like(tmp_path, host):
    x509 = pytest.importorskip("cryptography.x509")
    serve.make_certificate(tmp_path / "cert.pem", tmp_path / "key.pem", host)
    made = x509.load_pem_x509_certificate((tmp_path / "cert.pem").read_bytes())
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {host, "localhost", "127.0.0.1", "::1"} <= {str(name.value) for name in names}


@pytest.mark.parametrize("minutes", [float("inf"), float("nan"), 1e308, 0.0])
def test_minutes_have_a_limit(minutes):
    with pytest.raises(serve.InputError, match="minutes"):
        serve.check_settings(serve.Config(minutes=minutes))


@pytest.mark.parametrize("port", [-1, 0, 65536])
def test_a_port_is_one_that_can_be_opened(port):
    with pytest.raises(serve.InputError, match="a port is 1..65535"):
        serve.check_settings(serve.Config(port=port))


def test_a_folder_for_recordings_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(serve.InputError, match="file: no such folder can be made"):
        serve.check_settings(serve.Config(record=str(tmp_path / "file")))


def test_a_token_that_is_not_utf8_is_wrong():
    async def client(address, server):
        reader, writer = await asyncio.open_connection("127.0.0.1", address.split(":")[2][:-9])
        writer.write(b"GET /api/check HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\r\n\r\n")
        line = await reader.readline()
        writer.close()
        return line
    assert b" 401 " in run(client, token="secret")


def test_https_and_a_token(tmp_path):
    import talk

    async def both():
        cfg = serve.Config(mode="echo", ssl=True, certificate=str(tmp_path), token="secret")
        app = serve.make_app(cfg, serve.Echo(cfg), 1)
        server = test_utils.TestServer(app, scheme="https")
        await server.start_server(ssl=serve.tls_context(cfg))
        try:
            url = f"wss://localhost:{server.port}/api/chat"
            for wrong, message in (({}, "nobody has signed"), ({"insecure": True}, "the token")):
                with pytest.raises(serve.InputError, match=message):
                    await talk.talk(talk.Config(url=url, **wrong), in_frames(beeps()[:FRAME]))
            right = talk.Config(url=url, insecure=True, token="secret")
            return await talk.talk(right, in_frames(beeps()[:FRAME * 3]))
        finally:
            await server.close()
    _, answer = asyncio.run(both())
    assert len(answer.frames) == 3


def test_a_failing_model_leaves_nobody_waiting():
    async def client(address, server):
        def broken(*_):
            raise RuntimeError("broken")
        server.engine.tick, server.stop = broken, lambda: None
        async with connect(address, format="pcm") as ws:
            await ws.send(b"\x08" + bytes(2 * FRAME))
            return await everything(ws), ws.close_code, server.failure
    received, code, failure = run(client)
    assert code == 1011 and b"stopped" in received[-1] and isinstance(failure, RuntimeError)


def test_talk_saves_an_answer_as_long_as_its_file(tmp_path):
    import soundfile

    import talk
    audio = beeps()[:RATE * 2 + 100]
    soundfile.write(tmp_path / "beeps.wav", audio, RATE)
    frames = in_frames(audio)

    async def client(address, server):
        cfg = talk.Config(url=address, pace=False, name="Ann")
        said, answered = await talk.talk(cfg, frames)
        assert len(said) == len(answered.frames) == len(answered.waits()) == 26
        with pytest.raises(serve.InputError, match="the server refuses: seed: must be a number"):
            await talk.talk(talk.Config(url=address, seed="x"), frames)
        return np.concatenate([np.zeros(FRAME), *answered.frames])
    assert abs(lag(run(client), audio) - 92.9) < 0.2
    with pytest.raises(serve.InputError, match="cannot be reached"):
        talk.main([str(tmp_path / "beeps.wav"), "url=ws://127.0.0.1:9/api/chat"])


@pytest.mark.parametrize("lost, said", [(1, "as Moshi's does"), (3, "not answered 3 of 15 frames")])
def test_talk_does_not_wait_for_ever(tmp_path, monkeypatch, capsys, lost, said):
    """A server that says nothing to the first frames, as Moshi's to one: what came is saved, where
    it was heard."""
    import soundfile

    import talk
    soundfile.write(tmp_path / "beeps.wav", beeps()[:FRAME * 15], RATE)
    answer = serve.Session.answer

    def silent_at_first(session, said, words):
        session.asked = getattr(session, "asked", 0) + 1
        if session.asked > lost:
            answer(session, said, words)
    monkeypatch.setattr(serve.Session, "answer", silent_at_first)
    monkeypatch.setattr(talk, "LAST_WAIT", 0.3)
    monkeypatch.setattr(serve, "DRAIN_SECONDS", 0.1)

    async def client(address, server):
        words = [str(tmp_path / "beeps.wav"), f"url={address}", "pace=false",
                 f"out={tmp_path}/answer.wav"]
        await asyncio.to_thread(talk.main, words)
    run(client)
    heard, _ = soundfile.read(tmp_path / "answer.wav")
    assert said in capsys.readouterr().err and len(heard) == FRAME * 15
    if lost == 1:
        assert abs(lag(heard, beeps()[:FRAME * 15]) - 92.9) < 0.2


@pytest.mark.parametrize("listen", ["-99", "inf", "nan"])
def test_talk_cannot_listen_for_less_than_nothing(listen):
    import talk
    with pytest.raises(serve.InputError, match=f"listen={float(listen)}: seconds"):
        talk.main(["file.wav", f"listen={listen}"])


def test_talk_says_what_is_wrong_with_an_address():
    import talk

    async def client(address, server):
        for wrong in (address.removesuffix("/api/chat"),
                      address.replace("ws:", "http:").removesuffix("/api/chat") + "/"):
            with pytest.raises(serve.InputError, match=f"{wrong}: no .* like ws://localhost:8998/"):
                await talk.talk(talk.Config(url=wrong), in_frames(beeps()[:FRAME]))
    run(client)


def test_talk_looks_at_the_answers_place_before_it_begins(tmp_path, monkeypatch):
    import talk
    monkeypatch.setattr(talk, "talk", lambda *_: pytest.fail("has begun"))
    (tmp_path / "file").touch()
    for out, message in (("answer.xyz", "end the name in .wav"), ("file/answer.wav", "no such")):
        with pytest.raises(serve.InputError, match=message):
            talk.main([f"out={tmp_path}/{out}"])


def test_an_answer_to_the_microphone_is_saved_when_the_server_ends_the_talk(monkeypatch):
    """The close comes while the next frame is awaited."""
    import contextlib
    import types

    import talk
    ended = []

    class Input(contextlib.nullcontext):
        def __init__(self, *_, callback, **__):
            super().__init__()
            asyncio.create_task(self.speak(callback))

        async def speak(self, callback):
            for _ in range(5):
                callback(np.zeros((FRAME, 1), np.float32))
            while not (ended and ended[0].closed):
                await asyncio.sleep(0.01)
            callback(np.zeros((FRAME, 1), np.float32))  # of the frame that was awaited

    class Answer(talk.Answer):
        async def listen(self, ws, *more):
            ended.append(ws)
            await super().listen(ws, *more)
    player = types.SimpleNamespace(start=lambda: None, write=lambda frame: None)
    monkeypatch.setattr(talk, "Answer", Answer)
    monkeypatch.setattr(talk, "open_sound", lambda: types.SimpleNamespace(
        InputStream=Input, OutputStream=lambda *_, **__: player))

    async def client(address, server):
        return await talk.talk(talk.Config(url=address), None)
    said, answer = run(client, minutes=5 * 0.08 / 60)
    assert len(answer.frames) == 5 and len(said) == 6 and "limit" in answer.problem


# ---- with a model ----


@pytest.fixture(scope="module")
def talk_settings(tmp_path_factory):
    """Settings of a server with a tiny random model and codec."""
    import torch
    from conftest import GOLDEN

    from codec import MiniCodec, save_minicodec
    from model import FActor, load_checkpoint, save_checkpoint
    folder = tmp_path_factory.mktemp("live")
    torch.manual_seed(0)
    codec = MiniCodec(step_channels=(16, 16), frame_channels=32)
    save_minicodec(codec, folder / "codec.safetensors")
    small, tokenizer, fmt, _ = load_checkpoint(GOLDEN / "checkpoint")
    model = FActor(small.backbone, codec.num_codebooks, codec.codebook_size, 192)
    fmt.codebook_size = codec.codebook_size
    save_checkpoint(folder / "model", model, tokenizer, fmt, {})
    (folder / "voices.json").write_text(json.dumps({"a": [0.1] * 192, "b": [-0.1] * 192}))
    return {"model": str(folder / "model"), "codec": str(folder / "codec.safetensors"),
            "voices": str(folder / "voices.json"), "slots": 3}


def test_sessions_share_a_batch_and_change_nothing_of_each_other(talk_settings):
    talk = serve.Talk(serve.Config(**talk_settings))
    sound = np.random.default_rng(0).normal(0, 0.1, (12, FRAME)).astype(np.float32)

    def guest(seed, **query):
        return serve.Guest(serve.read_wishes({"seed": seed, **query}, talk.voices))
    one = guest("1", narrative="You lost your keys.")
    alone = [talk.tick([one], frame[None]) for frame in sound]
    talk.leave(one)
    first, second, third = guest("2", voice="b"), guest("1", narrative="You lost your keys."), None
    beside = []
    for k, frame in enumerate(sound):  # with one that comes earlier, one that waits, one that goes
        together = [first, second] if k % 3 else [second]
        if k == 5:
            third = guest("3", text_topk="1")
        if third and k < 9:
            together = [third, *together]
        if k == 9:
            talk.leave(first)
        if k >= 9:
            together = [second]
        said, words = talk.tick(together, np.stack([frame] * len(together)))
        beside.append((said[together.index(second)], words[together.index(second)]))
    for (said, words), (said_beside, words_beside) in zip(alone, beside):
        assert np.abs(said[0] - said_beside).max() < 1e-5 and words[0] == words_beside
        assert said_beside.shape == (FRAME,)


def test_wishes_reach_the_model(talk_settings):
    talk = serve.Talk(serve.Config(**talk_settings))

    def answer(**query):
        guest = serve.Guest(serve.read_wishes(query, talk.voices))
        said = [talk.tick([guest], np.zeros((1, FRAME), np.float32))[0][0] for _ in range(6)]
        talk.leave(guest)
        return np.concatenate(said)
    best = {"text_topk": "1", "audio_topk": "1"}
    plain, first = answer(seed="1"), answer(seed="1", **best)
    assert np.array_equal(plain, answer(seed="1")) and talk.prefix.cache_info().hits == 2
    assert not np.array_equal(plain, answer(seed="2"))
    assert np.array_equal(first, answer(seed="2", **best)) and not np.array_equal(plain, first)
    for other in ({"narrative": "You lost a dog."}, {"voice": "b"}, {"backchannels": "9"},
                  {"interruptions": "3"}, {"starts": "false"}, {"other": "Zoe"}):
        answer(**other)
    assert talk.prefix.cache_info().misses == 7  # each of them is another prompt
    with pytest.raises(serve.BadParameter, match="narrative: makes a prompt of"):
        talk.check(serve.read_wishes({"narrative": "q,!x." * 60}, talk.voices))


def test_a_conversation_is_recorded_as_generate_writes_it(talk_settings, tmp_path, monkeypatch):
    class AtOnce:
        def submit(function, job):
            done = Future()
            done.set_result(function(job))
            return done
    talk = serve.Talk(serve.Config(**talk_settings, record=str(tmp_path)))
    monkeypatch.setattr(serve.Talk, "writer", AtOnce)
    guest = serve.Guest(serve.read_wishes({"seed": "1", "name": "Ada"}, talk.voices))
    guest.recorded = True
    heard = np.zeros((6, FRAME), np.float32)
    heard[2] = 0.5
    for frame in heard:
        talk.tick([guest], frame[None])
    talk.leave(guest)
    import soundfile
    (stem,) = tmp_path.glob("*.json")
    audio, rate = soundfile.read(stem.with_suffix(".wav"))
    record = json.loads(stem.read_text())
    assert rate == 22050 and audio.shape == (7 * 1764, 2)
    assert np.abs(audio[2 * 1764 + 100:3 * 1764 - 100, 1] - 0.5).max() < 0.02  # where it was said
    assert [np.shape(codes) for codes in record["codes"]] == [(4, 7), (4, 7)]
    assert record["speakers"][0]["name"] == "Ada" and stem.with_suffix(".png").exists()
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("fault", ["open", "disk", "killed", "writing"])
def test_a_recording_that_fails_costs_nobody_the_talk(talk_settings, tmp_path, monkeypatch, capsys,
                                                      fault):
    class Broken:
        def submit(function, job):
            raise BrokenExecutor("killed")

    class Other:
        def submit(function, job):
            done.append(Future())
            done[-1].set_exception(MemoryError("no room")) if fault == "writing" else None
            return done[-1]

    def full(*_):
        raise OSError(28, "No space left on device")
    talk, done = serve.Talk(serve.Config(**talk_settings, record=str(tmp_path / "out"))), []
    if fault != "open":  # else there is no such folder
        (tmp_path / "out").mkdir()
    if fault == "disk":
        monkeypatch.setattr(serve.Recording, "write", full)
    monkeypatch.setattr(serve.concurrent.futures, "ProcessPoolExecutor", lambda *_, **__: Other)
    if fault == "killed":
        talk.writer = Broken
    guest = serve.Guest(serve.read_wishes({"seed": "1"}, talk.voices))
    guest.recorded = True
    said = [talk.tick([guest], np.zeros((1, FRAME), np.float32))[0] for _ in range(3)]
    talk.leave(guest)
    told = capsys.readouterr().out
    assert len(said) == 3 and not talk.seats and len(done) == (fault in ("killed", "writing"))
    assert told.count("is not written") == (fault != "killed")


def test_resampling_piece_by_piece_is_resampling():
    import scipy.signal
    time = np.arange(FRAME * 8) / RATE
    tone = np.sin(2 * np.pi * 440 * time).astype(np.float32)
    for rate_in, rate_out in ((RATE, 22050), (22050, RATE)):
        there = serve.Resampler(rate_in, rate_out)
        size = round(rate_in * 0.08)
        source = tone[:size * 8]
        pieces = np.concatenate([there(piece) for piece in source.reshape(8, size)])
        whole = scipy.signal.resample_poly(source, there.up, there.down)
        late = there.delay
        assert len(pieces) == round(rate_out * 0.08) * 8
        assert np.abs(pieces[late + 200:-200] - whole[200:len(whole) - late - 200]).max() < 1e-3
