"""Narratives from the system's side (paper 4, appendix B): by a plain rule, which prepare.py uses,
or by any chat model of transformers:

    python prepare.py rewrite data=DIR out=DIR2 model=google/gemma-1.1-7b-it   # the paper's
    python prepare.py rewrite data=DIR out=DIR2 model=CHAT_MODEL style=goal   # goals instead

Without this, 85 % of Behavior-SD's narratives name the starter first, and a model reads that
instead of its instruction. DIR is a folder of SPLIT-*.parquet in the released columns (of
prepare.py, or downloaded). DIR2 gets the same files with new new_narrative_s1, new_narrative_s2,
and rewritten.jsonl: a line for what was asked, then one per narrative and side. It is the report,
and what the same command goes on from after a cut. A result that fails `flaw` after all tries is
not used: the narrative that DIR has stays, and is listed.
"""
import json
import re
import shutil
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from config import InputError, brief, load_settings, make_folder, read_text, write_atomically

# The prompt of the paper's figure 3. That of its goals is not printed: appendix B.1 only says that
# there was one.
PROMPTS = {"narrative": """\
Your task is to rewrite a written narrative from the perspective of a specified speaker, \
replacing only that speaker's name and pronouns with "you" and "your".
Do NOT change other characters or their pronouns.
Do NOT change the narrative events or add explanations. Maintain the narrative flow and adjust \
active/passive voice as needed.
Example:
Input: Replace Karina and corresponding pronouns with you and your.
Karina was playing her music loudly and Yoseph did not enjoy it. The bass was thumping and the \
lyrics were explicit. Yoseph felt annoyed and asked Karina to turn it down.
Output: You were playing your music loudly and Yoseph did not enjoy it. The bass was thumping and \
the lyrics were explicit. Yoseph felt annoyed and asked you to turn it down.
New Input Narrative:
Replace {name} and corresponding pronouns with you and your.
{narrative}
Output Narrative:""", "goal": """\
Your task is to turn a written narrative of a dialogue into the goals of one of its two speakers, \
who is addressed as "you".
Write one to three short sentences that say what you want to achieve, learn or tell in the \
dialogue. Name the other speaker.
Do NOT tell what the other speaker will say or do, and do NOT say who starts the dialogue. Do NOT \
add explanations.
Example:
Input: Write the goals of Karina, who talks to Yoseph.
Karina was playing her music loudly and Yoseph did not enjoy it. The bass was thumping and the \
lyrics were explicit. Yoseph felt annoyed and asked Karina to turn it down.
Output: You want to go on playing your music loudly. If Yoseph complains, find out what bothers \
him and come to terms with him.
New Input Narrative:
Write the goals of {name}, who talks to {other}.
{narrative}
Output Goals:"""}


@dataclass
class RewriteSettings:
    data: str = "data"  # folder of SPLIT-*.parquet
    out: str = "data_rewritten"
    model: str = "google/gemma-1.1-7b-it"  # a chat model: hub id, folder, or .gguf file
    style: str = "narrative"  # narrative (paper figure 3) | goal (appendix B.1)
    batch: int = 32  # narratives written at a time
    tries: int = 4  # for each: the first greedy, then by sampling
    temperature: float = 0.7  # of the sampling
    shortest: float = 0.6  # allowed length, as a multiple of the narrative's (style narrative)
    longest: float = 1.5
    seed: int = 0


# ---- the plain rule ----

# names that are words too: at the start of a sentence, before a subject or an object, they are
# those
VERBS = set("Will May Mark Sue Grant Chase Pat Rob Bill Don Skip Chuck Hope Drew Pierce".split())
SUBJECTS = set("i you he she it we they his her him my your our their them us the a an this that "
               "these those there anyone someone everyone".split())
AUXILIARIES = {"was": "were", "is": "are", "has": "have", "does": "do"}


def named(name):
    """Regular expression that finds a name in a text, with whichever apostrophe, but not inside
    another, as Ann in Ann-Marie. A name in small letters is found with a capital too."""
    pattern = re.sub(r"['’ʼ]", "['’ʼ]", re.escape(unicodedata.normalize("NFC", name)))
    pattern = re.sub(r"(\\ )+", r"\\s+", pattern)
    if pattern[0].islower():
        pattern = f"[{pattern[0]}{pattern[0].upper()}]{pattern[1:]}"
    return rf"(?<!\w)(?<!\w-){pattern}(?!\w|-\w)"


def from_the_side_of(name, narrative):
    """A narrative with `name` replaced by you and your, for raw sets without rewritten narratives.

    It leaves pronouns as they are ("you ... his room"), and names that may be a verb ("Will Ann
    wait?"): `flaw` tells. The paper lets a chat model rewrite.
    """
    you = "\0you"  # marked until the end, since a narrative may have a "you" of its own
    who, apostrophe = named(name), "['’ʼ]"

    def replace(match):
        behind = re.match(r"\s+(\w+)", match.string[match.end():])
        opens = re.search(r"(^|[.!?:]\W*)$", match.string[:match.start()])
        if name in VERBS and opens and behind and (behind[1][0].isupper() or behind[1] in SUBJECTS):
            return match[0]
        return you + ("r" if match["own"] else "")

    text = unicodedata.normalize("NFC", narrative)
    end = rf"{apostrophe}(?=\s+\w)" if name[-1:] in "sxz" else "(?!)"  # James' car
    text = re.sub(rf"{who}(?P<own>{apostrophe}s\b|{end})?", replace, text)
    ask = rf"\b(Is|Was|Has|[Dd]oes)(n{apostrophe}t)?(\s+)(?={you}\b)"
    text = re.sub(ask, lambda m: agree(m[1]) + (m[2] or "") + m[3], text)
    tell = rf"({you}\s+)({'|'.join(AUXILIARIES)})(n{apostrophe}t)?(?!{apostrophe}?\w)"
    text = re.sub(tell, lambda m: m[1] + agree(m[2]) + (m[3] or ""), text)
    text = re.sub(r"((?:^|[.!?][\"”’')]*\s+)[\"“‘'(]*)\0y", r"\1Y", text)
    return text.replace("\0", "")


def agree(verb):
    """is -> are, Does -> Do: the auxiliary that goes with you."""
    new = AUXILIARIES[verb.lower()]
    return new.capitalize() if verb[0].isupper() else new


def flaw(text, name, other, narrative, settings):
    """What is wrong with a rewritten narrative, in words; '' if nothing is."""
    def has(word, where):
        return re.search(named(word), unicodedata.normalize("NFC", where)) is not None

    words, most = len(text.split()), settings.longest * len(narrative.split())
    least = settings.shortest * len(narrative.split())
    if settings.style == "goal":  # its length is not the narrative's: one to three short sentences
        least, most = 5, 80
    if has(name, text):
        return f"still names {name}"
    if has(other, narrative) and not has(other, text):
        return f"lost {other}"
    if has(name, narrative) and not re.search(r"\byou", text, re.IGNORECASE):
        return f"does not address {name} as you"
    for example in ("Karina", "Yoseph"):  # small models tell the prompt's example again
        if has(example, text) and not has(example, narrative):
            return f"speaks of {example}, who is the prompt's example"
    if not least <= words <= most:
        return f"has {words} words, not {least:.0f} to {most:.0f}"
    return ""


# ---- a chat model ----


def load_chat_model(name):
    """Hub id, folder or .gguf file of a chat model -> (model, tokenizer), on a GPU if there is
    one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # prepare.py needs none
    path, gguf = Path(name), {}
    if path.suffix == ".gguf":
        path, gguf = path.parent, {"gguf_file": path.name}
    source = path if gguf else name
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **gguf)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=kind, **gguf)
    except Exception as e:  # the hub's, transformers' and tokenizers' many errors end the same way
        raise InputError(f"model={name}: cannot be loaded ({type(e).__name__}: "
                         f"{brief(e)}); give a folder or hub id of a causal "
                         "LM, and HF_TOKEN if it is gated") from e
    if not tokenizer.chat_template:
        raise InputError(f"model={name}: is no chat model (its tokenizer has no chat template); "
                         "give an instruct version")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
def write(model, tokenizer, prompts, words, temperature):
    """The chat model's answers to a batch of prompts, a list of texts of about `words` words.
    temperature 0: greedy."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]  # Gemma: no system role
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True,
        return_tensors="pt").to(model.device)
    how = {"do_sample": False}
    if temperature:
        how = {"do_sample": True, "temperature": temperature, "top_p": 0.95}
    ids = model.generate(**inputs, **how, max_new_tokens=3 * words + 40,
                         pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def tidy(answer):
    """An answer without the heading and the quotation marks that chat models like to put around it,
    in one line."""
    heading = r"^\W*Output( Narrative| Goals)?\W*:\W*"
    return re.sub(heading, "", " ".join(answer.split()), flags=re.IGNORECASE).strip('"“”*` ')


def rewrite(jobs, settings, ask):
    """[(name, other, narrative)] -> iterator over batches of results: dicts of these three, text
    ('' if no try was good), tries, and flaw (of the last try, with its text).

    ask(prompts, words of the longest narrative, temperature) -> answers.
    """
    for k in range(0, len(jobs), settings.batch):
        results = [dict(zip(("name", "other", "narrative"), job))
                   for job in jobs[k:k + settings.batch]]
        left = results
        for attempt in range(settings.tries):
            prompts = [PROMPTS[settings.style].format(**result) for result in left]
            longest = max(len(result["narrative"].split()) for result in left)
            answers = ask(prompts, longest, settings.temperature if attempt else 0)
            for result, answer in zip(left, map(tidy, answers)):
                wrong = flaw(answer, result["name"], result["other"], result["narrative"], settings)
                result |= {"text": "" if wrong else answer, "tries": attempt + 1,
                           "flaw": wrong and f"{wrong}: {answer}"}
            left = [result for result in left if result["flaw"]]
            if not left:
                break
        yield results


def open_journal(path, asked):
    """OUT/rewritten.jsonl -> (results in it, the file to go on in). A line that cannot be read, as
    after a power cut, is left out. Raises InputError if something else was asked for."""
    whole = []
    for line in read_text(path).splitlines() if path.exists() else []:
        try:
            whole.append(json.loads(line))
        except ValueError:
            print(f"note: {path}: a line cannot be read; what it held is written again")
    made, *results = whole or [asked]
    if results and made != asked:
        differs = [f"{key} was {made.get(key)} and is {value}" for key, value in asked.items()
                   if made.get(key) != value]
        raise InputError(f"{path}: holds narratives whose {', '.join(differs)}; give another out= "
                         "or remove it")
    lines = "".join(json.dumps(line) + "\n" for line in (asked, *results))
    write_atomically(path, lambda new: new.write_text(lines))
    return results, open(path, "a")


def find_jobs(data):
    """{shard of the folder `data`: its jobs (name, other, narrative)}: two a row, from the side of
    the first speaker, then of the second."""
    columns, jobs = ["speakers", "narrative", "new_narrative_s1", "new_narrative_s2"], {}
    for path in sorted(data.glob("*.parquet")):
        try:
            rows = pq.read_table(path, columns=columns).to_pylist()
        except (pa.ArrowException, OSError) as e:
            raise InputError(f"{path}: cannot read the columns {', '.join(columns)}: "
                             f"{brief(e, 200)}") from e
        jobs[path] = []
        for row in rows:
            first, second = row["speakers"]
            jobs[path] += [(first, second, row["narrative"]), (second, first, row["narrative"])]
    return jobs


def write_shard(path, jobs, done, out):
    """The shard at `path` with the narratives that are `done`, {job: result}, in folder `out`."""
    table = pq.read_table(path)
    for side in (0, 1):
        column = f"new_narrative_s{side + 1}"
        old = table[column].to_pylist()
        new = [done[job]["text"] or kept for job, kept in zip(jobs[side::2], old)]
        at = table.column_names.index(column)
        table = table.set_column(at, column, pa.array(new, pa.string()))
    write_atomically(out / path.name, lambda new: pq.write_table(table, new, compression="zstd"))


def report(jobs, done, settings):
    kept = [done[job] for job in jobs if not done[job]["text"]]
    first = sum(done[job]["tries"] == 1 and done[job]["text"] != "" for job in jobs)
    print(f"{settings.out}: {len(jobs) - len(kept)} of {len(jobs)} narratives rewritten by "
          f"{settings.model}, {first} of them at the first try; {len(kept)} kept as they were, "
          f"listed with what was wrong in {settings.out}/rewritten.jsonl")
    for result in kept[:20]:
        print(f"  kept {result['name']}'s of {result['narrative'][:60]!r}: {result['flaw'][:120]}")


def main(argv):
    settings = load_settings(RewriteSettings, argv)
    if settings.style not in PROMPTS or min(settings.batch, settings.tries) < 1:
        raise InputError(f"style must be one of {', '.join(PROMPTS)}, batch and tries at least 1")
    if not 0 < settings.temperature < float("inf") or not 0 <= settings.shortest < settings.longest:
        raise InputError("temperature must be above 0, and shortest below longest")
    data, out = Path(settings.data), Path(settings.out)
    wanted = find_jobs(data)
    if not wanted or out.resolve() == data.resolve():
        raise InputError(f"data={data}, out={out}: give the folder that holds a data set's "
                         "SPLIT-*.parquet, and another one")
    others = {path.name for path in out.glob("*.parquet")} - {path.name for path in wanted}
    if others:  # training would read them too
        raise InputError(f"{out}: already holds {', '.join(sorted(others)[:3])}, which {data} does "
                         "not; give another out= or remove them")
    make_folder(out)
    asked = {key: value for key, value in asdict(settings).items() if key not in ("out", "batch")}
    results, journal = open_journal(out / "rewritten.jsonl", asked)
    done = {(r["name"], r["other"], r["narrative"]): r for r in results}
    jobs = dict.fromkeys(job for part in wanted.values() for job in part)  # each once
    todo = [job for job in jobs if job not in done]
    todo.sort(key=lambda job: len(job[2]))  # of like length: little padding
    print(f"{len(todo)} narratives to write; {len(jobs) - len(todo)} of {len(jobs)} are there "
          "already")
    if todo:
        model, tokenizer = load_chat_model(settings.model)
        torch.manual_seed(settings.seed)
        batches = rewrite(todo, settings, lambda *what: write(model, tokenizer, *what))
        with tqdm(total=len(todo), unit="narrative") as bar, journal:
            for results in batches:
                journal.writelines(json.dumps(result) + "\n" for result in results)
                journal.flush()
                done |= {(r["name"], r["other"], r["narrative"]): r for r in results}
                bar.update(len(results))
    for path, part in wanted.items():
        write_shard(path, part, done, out)
    for name in ("info.json", "voices.json", "dropped.jsonl"):  # of prepare.py; they stay true
        if (data / name).exists():
            shutil.copy(data / name, out)
    report(jobs, done, settings)
