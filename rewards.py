"""What reinforce.py pays for: rewards of one side of a dialogue, from its text rows alone. Times
are in seconds; a segment is what turns.py makes of a text row's words: start, end, text, label.

Two tasks. The *instruction*: two instances talk, and each was asked for so many backchannels and
interruptions. The four *axes* of "Multi-Faceted Interactivity Alignment" (arXiv 2606.11167): the
user is a recording, in which it pauses, ends its turn, tells at length, or interrupts. Its rewards
pay for barging in (minus the delay after the user's turn is highest for who starts before its end)
and for silence (who never speaks need not yield); ours do not.
"""
import math

import matplotlib
import numpy as np

from data import FRAME_RATE, mark_kind
from generate import stream_words
from turns import label_segments, merge_words

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend has to be chosen first

AXES = ("pause", "turn", "backchannel", "interruption")
WEIGHTS = {  # of the rewards, each in units of its spread
    "backchannels": 1.0, "interruptions": 1.0, "pace": 0.5, "overlap": 0.5, "marks": 0.25,
    "yields_talk": 0.25, "words": 0.5, "pause": 1.0, "turn": 1.0, "backchannel_f1": 1.0,
    "delay": 1.0, "yields": 0.25, "answer": 0.5, "judge": 0.5}
BRIEF = 1.0  # seconds: longer speech is no backchannel, but a takeover (arXiv 2606.11167)
EARLY, LATE = 0.25, 0.75  # an answer so many seconds before or after a turn's end is worth 0.61


def find_segments(texts, tokenizer):
    """Text rows of both speakers -> labelled segments of turns.py, each with `kinds`, of the
    marks in it."""
    words = [stream_words(text, tokenizer) for text in texts]
    segments = label_segments(merge_words(words))
    return [s | {"kinds": [mark_kind(word["kind"]) for word in words[s["speaker"]]
                           if word["kind"] and s["start"] <= word["start"] < s["end"]]}
            for s in segments]


def is_backchannel(s):
    brief = s["end"] - s["start"] <= BRIEF and len(s["text"].split()) <= 3
    return s["label"] == "backchannel" and brief


def words_of(segments):
    return " ".join(s["text"] for s in segments)


def count_own(own):
    """(backchannels, interruptions) among the segments of one side."""
    return (sum(is_backchannel(s) for s in own), sum(s["label"] == "interruption" for s in own))


def instruction_rewards(own, other, asked, seconds):
    """{name: reward} of a side. own, other: segments; asked: (backchannels, interruptions);
    seconds: of the dialogue, in which nearly all sides of the small world say a word in two."""
    found = count_own(own)
    times = [s["start"] for s in own if is_backchannel(s)]
    long = [s for s in own if s["label"] == "backchannel" and not is_backchannel(s)]
    mistaken = [kind for s in own for kind in s["kinds"] if kind != s["label"]]  # no free points
    cut = [mine["end"] - s["start"] for s in other if s["label"] == "interruption"
           for mine in own if mine["start"] < s["start"] < mine["end"]]
    return {"backchannels": -abs(found[0] - asked[0]),
            "interruptions": -abs(found[1] - asked[1]),
            "pace": -unevenness(times, other),
            "overlap": -len(long), "marks": -len(mistaken),
            "yields_talk": -sum(goes_on(seconds) for seconds in cut),
            "words": -float(is_poor(own, least=max(5, seconds / 2)))}


def unevenness(times, other):
    """Mean over the other's speech of |share of the own backchannels so far - share of that speech
    passed|: without, they come in bunches. How many they are makes no difference."""
    passed = [t for s in other for t in np.arange(s["start"], s["end"], 1 / FRAME_RATE)]
    if not passed or not times:
        return 0.0
    so_far = np.searchsorted(np.sort(times), np.sort(passed), "right") / len(times)
    return float(np.abs(so_far - np.arange(1, len(passed) + 1) / len(passed)).mean())


def goes_on(seconds):
    """From 0 to 1: how far speech of so many seconds goes on after an interruption: from 8 frames
    on, a time to react, it counts, and 20 are all of it."""
    return min(1.0, max(0.0, (seconds - 8 / FRAME_RATE) / (12 / FRAME_RATE)))


def is_poor(own, least):
    """Fewer than `least` words, or more than 10 % of their threes repeat: of the small world's own
    sides 1 % repeat more than 6 %."""
    words = words_of(own).split()
    threes = list(zip(words, words[1:], words[2:]))
    return len(words) < least or 1 - len(set(threes)) / max(1, len(threes)) > 0.1


def axis_rewards(axis, own, events, end):
    """{name: reward} with a recorded user. own: segments; events: [[begin, end]], what they are
    depends on the axis (world/segments.py); end: of the segment. `pause` is Full-Duplex-Bench's
    rule, `turn`, `delay` and `answer` are ours; the others follow the paper."""
    new = [s for s in own if 0 <= s["start"] < end]  # what began before is the recording's
    long = [s for s in new if s["end"] - s["start"] > BRIEF]
    if axis == "pause":  # the user only pauses; a takeover is Full-Duplex-Bench's
        words = sum(len(s["text"].split()) for s in new)
        lasts = new[-1]["end"] - new[0]["start"] if new else 0.0
        return {"pause": -float(lasts >= BRIEF or words > 3)}
    if axis == "turn":  # the paper's minus delay pays for barging in
        late = long[0]["start"] - events[-1][1] if long else math.inf
        return {"turn": on_time(late), "answer": answer(long)}
    if axis == "backchannel":
        return {"backchannel_f1": f1([s["start"] for s in new if s not in long],
                                     [begin for begin, _ in events], len(long))}
    begin, stop = events[-1]  # the user interrupts
    cut = [s["end"] - begin for s in own if s["start"] < begin < s["end"]]
    answers = [s for s in long if s["start"] > begin and s["start"] >= stop - EARLY]
    late = answers[0]["start"] - stop if answers else math.inf
    return {"delay": on_time(late), "answer": answer(answers),  # who was silent has yielded nothing
            "yields": 1 - goes_on(max(cut)) if cut else 0.0}


def on_time(late):
    """From 0 to 1: an answer so many seconds after a turn's end, or, below 0, before it."""
    return math.exp(-0.5 * (late / (LATE if late > 0 else EARLY)) ** 2)


def answer(segments):
    """From 0 to 1: words of the first segment, of the five that are enough."""
    return min(1.0, len(segments[0]["text"].split()) / 5) if segments else 0.0


def f1(found, wanted, takeovers):
    """Times within a second of each other match; takeovers are false ones. Nothing where nothing is
    wanted is 1."""
    left, hits = list(wanted), 0
    for time_ in found:
        near = min(left, key=lambda other: abs(other - time_), default=math.inf)
        if abs(near - time_) <= 1:
            left.remove(near)
            hits += 1
    return 2 * hits / total if (total := len(found) + takeovers + len(wanted)) else 1.0


JUDGE = """Rate the reply of speaker B to speaker A: 0 if it is silent, gibberish or irrelevant, \
1 if it is generic, 2 if it is specific. Answer with the digit only.
A: {user}
B: {own}"""


def rate(judge, rows):
    """Adds the reward `judge` (model and tokenizer of rewrite.load_chat_model) to rows of
    rollout.py: of the instruction, and of the axes in which the system is to answer."""
    from rewrite import write
    rows = [row for row in rows if row.get("axis") not in ("pause", "backchannel")]
    for row in rows:  # small judges call silence specific
        row["rewards"]["judge"] = 0.0
    spoken = [row for row in rows if row["said"].strip()]
    prompts = [JUDGE.format(user=row["heard"], own=row["said"]) for row in spoken]
    for row, text in zip(spoken, write(*judge, prompts, 1, 0) if spoken else ()):
        row["rewards"]["judge"] = {"1": 1.0, "2": 2.0}.get(text.strip()[:1], 0.0)


# ---- what is logged ----


def count_figures(counted):
    """How counts follow those asked for: Pearson r (0 where it is none), mean error, exact share.
    counted (N, 4): asked backchannels and interruptions, counted ones."""
    figures = {}
    for k, kind in enumerate(("backchannels", "interruptions") if len(counted) else ()):
        asked, found = counted[:, k], counted[:, k + 2]
        spread = asked.std() and found.std()
        figures |= {f"r_{kind}": float(np.corrcoef(asked, found)[0, 1]) if spread else 0.0,
                    f"mae_{kind}": float(np.abs(asked - found).mean()),
                    f"exact_{kind}": float((asked == found).mean())}
    return figures


def score(found):
    """What the best is chosen by: for each kind of event Pearson r minus the mean error; and the
    axes' rewards. r alone would not see a number that is always too large."""
    parts = [found[key] for key in found if key.startswith("r_")]
    parts += [-found[key] for key in found if key.startswith("mae_")]
    axes = ("pause", "turn", "backchannel_f1", "delay")
    return float(sum(parts) + sum(found.get(f"held_out_{key}", 0.0) for key in axes))


def merged(parts):
    """A list of dicts of lists -> one dict of all of each key's."""
    return {key: [x for part in parts for x in part.get(key, [])] for key in set().union(*parts)}


def draw_curves(path, log):
    """A PNG of the log's columns over the updates."""
    names = list(dict.fromkeys(key for row in log for key in row))
    panels = {"rewards while learning": [key for key in names if key in WEIGHTS],
              "rewards, held out": [key for key in names if key.startswith("held_out_")],
              "counts, held out": [key for key in names if key.startswith(("r_", "exact_"))],
              "KL divergence a frame": ["kl"]}
    fig, axes = plt.subplots(2, 2, figsize=(16, 8))
    for ax, (title, keys) in zip(axes.flat, panels.items()):
        ax.set_prop_cycle(color=plt.get_cmap("tab20").colors)  # as many as there are rewards
        for key in keys:
            rows = [row for row in log if key in row]
            ax.plot([row["update"] for row in rows], [row[key] for row in rows], ".-", label=key)
        ax.set(title=title, xlabel="update")
        if keys:
            ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.tight_layout()
    fig.savefig(path, dpi=70, format="png")
    plt.close(fig)
