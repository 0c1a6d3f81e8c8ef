"""web/index.html in a real browser: Debian's chromium without a screen, with a recording as its
microphone. Needs `apt-get install chromium` and `pip install playwright`."""
import asyncio
import collections
import shutil

import numpy as np
import pytest

pytest.importorskip("sphn", reason="needs requirements-live.txt")
test_utils = pytest.importorskip("aiohttp.test_utils", reason="needs requirements-live.txt")
playwright = pytest.importorskip("playwright.async_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium")

import serve  # noqa: E402  behind what it needs
from ogg import FRAME, RATE  # noqa: E402

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--host-resolver-rules=MAP talk.test 127.0.0.1"]
MICROPHONE = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


class Talking(serve.Echo):
    """Says what it hears, and a word every half second."""

    voices = ["one", "two"]

    def __init__(self, cfg):
        super().__init__(cfg)
        self.frames = collections.Counter()

    def tick(self, sessions, heard):
        self.frames.update(sessions)
        return heard, [[("[BC]", " mhm")] if self.frames[session] % 6 == 0 else []
                       for session in sessions]


def start(port=None, engine=Talking, **settings):
    cfg = serve.Config(mode="echo", **settings)
    return test_utils.TestServer(serve.make_app(cfg, engine(cfg), cfg.slots or 4), port=port)


def browse(visit, microphone=None):
    """`await visit(open)`, where open(server) gives a page of a browser that hears this file; None:
    that has no microphone."""
    async def both():
        async with playwright.async_playwright() as library:
            flags = list(FLAGS)
            if microphone:
                flags += [*MICROPHONE, f"--use-file-for-fake-audio-capture={microphone}"]
            browser = await library.chromium.launch(executable_path=CHROMIUM, args=flags)

            async def open_page(server, query="", host="localhost"):
                page = await browser.new_page()
                page.on("pageerror", lambda e: page.errors.append(str(e)))
                page.errors = []
                await page.goto(f"http://{host}:{server.port}/{query}")
                await until(page, "document.querySelector('[name=voice]').length >= 2")
                return page
            await visit(open_page)
            await browser.close()
    asyncio.run(asyncio.wait_for(both(), 240))


@pytest.fixture
def tone(tmp_path):
    import soundfile
    audio = 0.3 * np.sin(2 * np.pi * 300 * np.arange(RATE * 5) / RATE)
    soundfile.write(tmp_path / "tone.wav", audio, RATE)
    return tmp_path / "tone.wav"


@pytest.fixture
def speech(tmp_path):
    import soundfile
    from conftest import ROOT
    audio, rate = soundfile.read(ROOT / "tests" / "speech" / "dialogue.ogg")
    soundfile.write(tmp_path / "speech.wav", audio[:, 1], rate)
    return tmp_path / "speech.wav"


async def until(page, condition, seconds=30):
    """Waits for a condition in JavaScript; playwright's way needs eval, which the page forbids."""
    for _ in range(seconds * 10):
        if await page.evaluate(condition):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"not in {seconds} s: {condition}; {await page.inner_text('#status')}")


async def frames(page, number, seconds=30):
    """Waits until so many frames have come."""
    await until(page, f"window.talk && talk.frames[0].length >= {number}", seconds)


async def loudest(page, side):
    return await page.evaluate(
        f"Math.max(...talk.frames[{side}].flatMap(frame => [...frame]).map(Math.abs)) / 32767")


async def saved_sound(page):
    """What its button gives: (samples (N, 2), rate)."""
    import soundfile
    async with page.expect_download() as download:
        await page.click("#wav")
    return soundfile.read(await (await download.value).path())


def test_two_tabs_talk_and_come_back_when_the_server_restarts(tone):
    async def visit(open_page):
        server = start()
        await server.start_server()
        pages = [await open_page(server), await open_page(server)]
        for page in pages:
            await page.focus("#start")
            await page.keyboard.press("Enter")
            await until(page, "document.activeElement.id == 'stop'")
        for page in pages:
            await frames(page, 25)
            assert await loudest(page, 0) > 0.2  # the microphone, there and back
            words = await page.evaluate("talk.words[0].map(word => word.mark + word.text)")
            assert words and set(words) == {"[BC]mhm"}
            assert "mhm" in await page.inner_text("#said")
            assert "connected" in await page.inner_text("#status")
            assert 0 < await page.evaluate("talk.latency.server") < 2000
        port = server.port
        await pages[1].close()
        await server.close()
        await until(pages[0], "document.querySelector('#status').className == 'bad'")
        before = await pages[0].evaluate("talk.frames[0].length")
        async with start(port):
            await frames(pages[0], before + 25)
            assert "connected" in await pages[0].inner_text("#status")
            await pages[0].keyboard.press("Enter")  # on Stop
            await until(pages[0], "document.activeElement.id == 'start'")
            audio, rate = await saved_sound(pages[0])
            assert rate == RATE and audio.shape[1] == 2 and len(audio) >= 50 * FRAME
            assert not pages[0].errors
    browse(visit, tone)


@pytest.mark.parametrize("form", ["pcm", "opus"])
def test_without_a_microphone(tone, form):
    async def visit(open_page):
        async with start() as server:
            page = await open_page(server, f"?format={form}")
            await page.check("[value=file]")
            await page.set_input_files("#file", str(tone))
            await page.click("#start")
            await frames(page, 25)
            assert await loudest(page, 0) > 0.2 and await loudest(page, 1) > 0.2
            assert await page.evaluate("talk.wishes[0].format") == form
            await page.click("#stop")
            await page.check("[value=two]")
            await page.click("#start")
            await until(page, "talk.what == 'two' && talk.words[1].length > 2")
            assert await page.evaluate("talk.wishes[1].voice") == "two" and not page.errors
            assert await page.evaluate("talk.frames[0].length == talk.frames[1].length")
    browse(visit, tone)


HOLD = """name => {
    const devices = navigator.mediaDevices, sound = AudioWorklet.prototype;
    const {getUserMedia} = devices, {addModule} = sound;
    const wait = async here => {
        if (here === name) await new Promise(go => { window.allow = go; });
    };
    devices.getUserMedia = async what => {
        await wait("getUserMedia");
        return window.stream = await getUserMedia.call(devices, what);
    };
    sound.addModule = async function (url) {
        await wait("addModule");
        return addModule.call(this, url);
    };
}"""


@pytest.mark.parametrize("name", ["getUserMedia", "addModule"])
def test_stop_during_the_start(tone, name):
    """Stop while the browser asks for the microphone, or opens the sound: nothing stays on, and
    what is left of the old talk does not reach the next one."""
    async def visit(open_page):
        async with start() as server:
            page = await open_page(server)
            await page.evaluate(HOLD, name)
            await page.click("#start")
            await until(page, "!!window.allow")
            await page.click("#stop")
            await page.evaluate("allow()")
            await until(page, "window.stream && stream.getTracks().every("
                        "track => track.readyState == 'ended')", 5)
            await asyncio.sleep(0.5)
            assert await page.inner_text("#status") == "stopped"
            assert await page.evaluate("!context && !talk.lines.length && !talk.running")
            for run in range(2):
                await page.evaluate("window.allow = null")
                await page.click("#start")
                await until(page, "!!window.allow")
                await page.evaluate("allow()")
                await frames(page, 5)
                if run == 0:
                    await page.evaluate("window.old = talk.lines[0].to")
                    await page.click("#stop")
            await page.evaluate("old.text(' ghost'); old.frame(new Float32Array(FRAME))")
            assert await page.evaluate("!talk.words[0].some(word => /ghost/.test(word.text))")
            await page.evaluate("old.event({event: 'begin', limit_frames: 1})")
            await frames(page, 20)
            assert not page.errors
    browse(visit, tone)


def test_a_full_server_is_said(tone):
    async def visit(open_page):
        async with start(slots=1, queue=1) as server:
            pages = [await open_page(server) for _ in range(3)]
            for page in pages:
                await page.click("#start")
                await until(page, "!/connecting|^$/.test(document.querySelector('#status')"
                            ".textContent)")
            said = [await page.inner_text("#status") for page in pages]
            assert "connected" in said[0] and "number 1 in the queue" in said[1]
            assert "queue behind them are full" in said[2]
        async with start(slots=1, queue=4) as server:
            page = await open_page(server)
            await page.check("[value=two]")
            await page.click("#start")
            await until(page, "/two free slots/.test(document.querySelector('#status')"
                        ".textContent)", 10)
            assert await page.is_enabled("#start") and not page.errors
    browse(visit, tone)


def test_what_is_wrong_is_said():
    async def visit(open_page):
        async with start() as server:
            page, insecure = await open_page(server), await open_page(server, host="talk.test")
            assert "start serve.py with ssl=true" in await insecure.inner_text("#status")
            await insecure.click("#start")
            assert "only to https pages" in await insecure.inner_text("#status")
            await page.click("#start")
            await until(page, "document.querySelector('#status').className == 'bad'")
            assert "no microphone is plugged in" in await page.inner_text("#status")
            await page.check("[value=file]")
            await page.click("#start")
            await until(page, "/choose a recording/.test(document.querySelector('#status')"
                        ".textContent)")
            assert not page.errors and not insecure.errors
    browse(visit)


def test_the_words_of_the_model_are_heard_as_the_page_shows_them(speech):
    """Two tabs, both with a microphone, talk with the shipped model: what each has received is
    recognised as the words on its timeline."""
    pytest.importorskip("faster_whisper", reason="needs requirements-corpus.txt")
    import torch

    import evaluate
    import listen

    async def visit(open_page):
        async with start(engine=serve.Talk) as server:
            pages = [await open_page(server), await open_page(server)]
            for seed, page in enumerate(pages):
                await page.fill("[name=seed]", str(seed))
                await page.click("#start")
            for page in pages:
                await frames(page, 150, seconds=90)
                await page.click("#stop")
                words = await page.evaluate("talk.words[0].map(word => word.text).join(' ')")
                audio, rate = await saved_sound(page)
                heard = listen.to_16k(torch.tensor(audio[:, 0]), rate)
                found = listen.recognise(heard, listen.voiced(heard))
                text = " ".join(word["word"] for word in found)
                wrong, said = evaluate.word_errors(words, text)
                print(f"{words} | {text} | {wrong} of {said} words wrong")
                assert np.abs(heard).max() > 0.1 and said > 5 and wrong <= 0.4 * said
                assert not page.errors
    browse(visit, speech)
