"""Opus in Ogg (RFC 6716, 3533, 7845) as Moshi's protocol has it: 24 kHz mono, frames of 80 ms.

sphn codes and decodes Opus, but its own pages are not what every client takes, and some versions'
reader ends at the first bad page. So pages are written and read here: for serve.py and talk.py.
"""
import secrets
import struct
import sys
import zlib

import numpy as np

try:
    import sphn
except ImportError:
    sys.exit("sphn is missing; python -m pip install -r requirements-live.txt")

RATE, FRAME, FRAME_SECONDS = 24000, 1920, 0.08  # Hz, samples and seconds of a frame

REVERSED = bytes(int(f"{i:08b}"[::-1], 2) for i in range(256))


def ogg_crc(page):
    """Ogg's checksum (0x04c11db7, not reflected, from 0) by way of zlib's, which is reflected."""
    crc = zlib.crc32(page.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{crc:032b}"[::-1], 2)


def ogg_page(packets, flags, granule, serial, number):
    """One page of whole packets. flags: 2 begins a stream, 4 ends it."""
    lacing = b"".join(b"\xff" * (len(p) // 255) + bytes([len(p) % 255]) for p in packets)
    head = struct.pack("<4sBBqIIIB", b"OggS", 0, flags, granule, serial, number, 0, len(lacing))
    page = head + lacing + b"".join(packets)
    return page[:22] + struct.pack("<I", ogg_crc(page)) + page[26:]


class OggReader:
    """Bytes, cut anywhere -> the audio packets of the stream that began last.

    Pages before the first beginning, of other streams, and with a wrong checksum are left out, and
    so is what remains of a packet that began or ends on one that is lost.
    """

    def __init__(self):
        self.buffer, self.serial, self.part, self.number = b"", None, b"", -1

    def read(self, data):
        """-> list of packets."""
        self.buffer += data
        packets = []
        while (page := self._next_page()) is not None:
            packets += self._packets(page)
        return packets

    def _next_page(self):
        """The next whole page with a right checksum, or None."""
        while (start := self.buffer.find(b"OggS")) >= 0:
            self.buffer = buffer = self.buffer[start:]
            if len(buffer) < 27 or len(buffer) < 27 + buffer[26]:
                return None
            size = 27 + buffer[26] + sum(buffer[27:27 + buffer[26]])
            if len(buffer) < size:
                return None
            page = buffer[:size]
            self.buffer = buffer[size:]
            if ogg_crc(page[:22] + bytes(4) + page[26:]) == struct.unpack_from("<I", page, 22)[0]:
                return page
        self.buffer = self.buffer[-3:]  # a pattern may be cut
        return None

    def _packets(self, page):
        flags, serial, lacing = page[5], page[14:18], page[27:27 + page[26]]
        if flags & 2:
            self.serial, self.part = serial, b""
        if serial != self.serial:
            return []
        number = struct.unpack_from("<I", page, 18)[0]
        if not flags & 1 or number != self.number + 1:
            self.part = b""
        headless = flags & 1 and not self.part  # it goes on with a packet whose begin is lost
        packets, at, self.number = [], 27 + len(lacing), number
        for size in lacing:
            self.part += page[at:at + size]
            at += size
            if size < 255:
                packets += [] if headless else [self.part]
                self.part, headless = b"", False
        self.part = b"" if headless else self.part
        return [p for p in packets if not p.startswith((b"OpusHead", b"OpusTags"))]


class OggWriter:
    """Opus packets -> bytes of an Ogg stream that all the field's readers take: whole pages, the
    two headers together with the first audio, which has page number 2."""

    def __init__(self):
        self.serial, self.number, self.granule = secrets.randbits(32), 2, 0

    def write(self, packets):
        """The packets of one frame -> one page."""
        self.granule += 2 * FRAME  # always counted at 48 kHz
        before = self.headers() if self.number == 2 else b""
        page = ogg_page(packets, 0, self.granule, self.serial, self.number)
        self.number += 1
        return before + page

    def headers(self):
        """OpusHead (mono, 312 samples of delay at 48 kHz) and OpusTags, a page each."""
        head = struct.pack("<8sBBHIhB", b"OpusHead", 1, 1, 312, RATE, 0, 0)
        tags = struct.pack("<8sI7sI", b"OpusTags", 7, b"nanofac", 0)
        return ogg_page([head], 2, 0, self.serial, 0) + ogg_page([tags], 0, 0, self.serial, 1)


def opus_samples(packet):
    """Samples at 24 kHz in an Opus packet, by its first bytes (RFC 6716, 3.1); 0: not a packet."""
    if len(packet) < 1 or packet[0] & 3 > 1 and len(packet) < 2:  # silence may be one byte
        return 0
    config, code = packet[0] >> 3, packet[0] & 3
    if config < 12:
        size = (240, 480, 960, 1440)[config & 3]
    else:
        size = (240, 480)[config & 1] if config < 16 else (60, 120, 240, 480)[config & 3]
    samples = size * (packet[1] & 63 if code == 3 else (1, 2, 2)[code])
    return samples if samples <= 2880 else 0  # 120 ms


def single_frames(packet):
    """An Opus packet of two frames -> two packets of one (RFC 6716, 3.2); others stay."""
    code, head, body = packet[0] & 3, bytes([packet[0] & 0xFC]), packet[1:]
    if code not in (1, 2):
        return [packet]
    if code == 1:
        at = size = len(body) // 2
        return [head + body[:at], head + body[at:]]
    at, size = (1, body[0]) if body[0] < 252 else (2, body[0] + 4 * body[1])
    return [head + body[at:at + size], head + body[at + size:]]


class OpusEncoder:
    """Frames (1920,) float -> Opus packets of 20 ms, four a frame."""

    def __init__(self):
        self.writer, self.reader = sphn.OpusStreamWriter(RATE), OggReader()

    def encode(self, pcm):
        made = self.reader.read(self.writer.append_pcm(np.ascontiguousarray(pcm, np.float32)))
        return [small for packet in made for small in single_frames(packet)]


class OpusDecoder:
    """Opus packets -> samples (n,) float at 24 kHz; what is no packet gives none."""

    def __init__(self):
        self.reader, self.pages = sphn.OpusStreamReader(RATE), OggWriter()

    def decode(self, packet):
        if not (samples := opus_samples(packet)):
            return np.zeros(0, np.float32)
        try:
            pcm = self.reader.append_bytes(self.pages.write([packet]))
        except ValueError:  # not Opus inside; the decoder goes on with the next packet
            return np.zeros(0, np.float32)
        return pcm if len(pcm) == samples else np.zeros(0, np.float32)
