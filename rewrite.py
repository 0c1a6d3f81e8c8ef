"""Narratives from the system's side, by any chat model of transformers (paper 4, appendix B; `python prepare.py rewrite`).

    python prepare.py rewrite data=DIR out=DIR2 model=google/gemma-1.1-7b-it      # the paper's, for its training set
    python prepare.py rewrite data=DIR out=DIR2 model=CHAT_MODEL style=goal       # what the system is to achieve instead

Without this, 85 % of Behavior-SD's narratives name the starter first, and a model reads that instead of its instruction.
DIR is a folder of SPLIT-*.parquet in the released columns (of prepare.py, or downloaded). DIR2 gets the same files with
new new_narrative_s1, new_narrative_s2, and rewritten.jsonl: a line for what was asked, then one per narrative and side. It
is the report, and what the same command goes on from after a cut. A result that fails `flaw` after all tries is not used:
the narrative that DIR has (prepare.py: by a plain rule) stays, and is listed.
"""
import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from config import InputError, load_settings, write_atomically

# The prompt of the paper's figure 3. That of its goals is not printed: appendix B.1 only says that there was one.
PROMPTS = {"narrative": """\
Your task is to rewrite a written narrative from the perspective of a specified speaker, replacing only that speaker's name \
and pronouns with "you" and "your".
Do NOT change other characters or their pronouns.
Do NOT change the narrative events or add explanations. Maintain the narrative flow and adjust active/passive voice as needed.
Example:
Input: Replace Karina and corresponding pronouns with you and your.
Karina was playing her music loudly and Yoseph did not enjoy it. The bass was thumping and the lyrics were explicit. \
Yoseph felt annoyed and asked Karina to turn it down.
Output: You were playing your music loudly and Yoseph did not enjoy it. The bass was thumping and the lyrics were explicit. \
Yoseph felt annoyed and asked you to turn it down.
New Input Narrative:
Replace {name} and corresponding pronouns with you and your.
{narrative}
Output Narrative:""", "goal": """\
Your task is to turn a written narrative of a dialogue into the goals of one of its two speakers, who is addressed as "you".
Write one to three short sentences that say what you want to achieve, learn or tell in the dialogue. Name the other speaker.
Do NOT tell what the other speaker will say or do, and do NOT say who starts the dialogue. Do NOT add explanations.
Example:
Input: Write the goals of Karina, who talks to Yoseph.
Karina was playing her music loudly and Yoseph did not enjoy it. The bass was thumping and the lyrics were explicit. \
Yoseph felt annoyed and asked Karina to turn it down.
Output: You want to go on playing your music loudly. If Yoseph complains, find out what bothers him and come to terms with him.
New Input Narrative:
Write the goals of {name}, who talks to {other}.
{narrative}
Output Goals:"""}


@dataclass
class RewriteSettings:
    data: str = "data"  # folder of SPLIT-*.parquet
    out: str = "data_rewritten"
    model: str = "google/gemma-1.1-7b-it"  # any chat model of transformers: hub id, folder, or a .gguf file
    style: str = "narrative"  # narrative (paper figure 3) | goal (appendix B.1)
    batch: int = 32  # narratives written at a time
    tries: int = 4  # for each: the first greedy, then by sampling
    temperature: float = 0.7  # of the sampling
    shortest: float = 0.6  # allowed length, as a multiple of the narrative's (style narrative)
    longest: float = 1.5
    seed: int = 0


def load_chat_model(name):
    """Hub id, folder or .gguf file of a chat model -> (model, tokenizer), on a GPU if there is one."""
    path, gguf = Path(name), {}
    if path.suffix == ".gguf":
        path, gguf = path.parent, {"gguf_file": path.name}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path if gguf else name, padding_side="left", **gguf)
        model = AutoModelForCausalLM.from_pretrained(
            path if gguf else name, dtype=torch.bfloat16 if device == "cuda" else torch.float32, **gguf)
    except Exception as e:  # the hub's, transformers' and tokenizers' many errors: all end the same way for the user
        raise InputError(f"model={name}: cannot be loaded ({type(e).__name__}: {' '.join(str(e).split())[:150]}); give a "
                         "folder or hub id of a causal LM, and HF_TOKEN if it is gated") from e
    if not tokenizer.chat_template:
        raise InputError(f"model={name}: is no chat model (its tokenizer has no chat template); give an instruct version")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
def write(model, tokenizer, prompts, words, temperature):
    """The chat model's answers to a batch of prompts, a list of texts of about `words` words. temperature 0: greedy."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]  # Gemma knows no system role
    inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_dict=True,
                                           return_tensors="pt").to(model.device)
    how = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else {"do_sample": False}
    ids = model.generate(**inputs, **how, max_new_tokens=3 * words + 40, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def tidy(answer):
    """An answer without the heading and the quotation marks that chat models like to put around it, in one line."""
    answer = re.sub(r"^\W*Output( Narrative| Goals)?\W*:\W*", "", " ".join(answer.split()), flags=re.IGNORECASE)
    return answer.strip('"“”*` ')


def flaw(text, name, other, narrative, settings):
    """What is wrong with a rewritten narrative, in words; '' if nothing is."""
    def has(word, where):
        return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", where) is not None

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


def rewrite(jobs, settings, ask):
    """[(name, other, narrative)] -> iterator over batches of results: dicts of these three, text ('' if no try was good),
    tries, and flaw (of the last try, with its text). ask(prompts, words of the longest narrative, temperature) -> answers.
    """
    for k in range(0, len(jobs), settings.batch):
        results = [dict(zip(("name", "other", "narrative"), job)) for job in jobs[k:k + settings.batch]]
        left = results
        for attempt in range(settings.tries):
            answers = ask([PROMPTS[settings.style].format(**result) for result in left],
                          max(len(result["narrative"].split()) for result in left), settings.temperature * (attempt > 0))
            for result, answer in zip(left, map(tidy, answers)):
                wrong = flaw(answer, result["name"], result["other"], result["narrative"], settings)
                result |= {"text": "" if wrong else answer, "tries": attempt + 1, "flaw": wrong and f"{wrong}: {answer}"}
            left = [result for result in left if result["flaw"]]
            if not left:
                break
        yield results


def open_journal(path, asked):
    """OUT/rewritten.jsonl -> (results in it, the file to go on in). Raises InputError if something else was asked for."""
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []  # without a line that was cut off
    made, *results = map(json.loads, whole or [json.dumps(asked)])
    if results and made != asked:
        differs = [f"{key} was {made.get(key)} and is {value}" for key, value in asked.items() if made.get(key) != value]
        raise InputError(f"{path}: holds narratives whose {', '.join(differs)}; give another out= or remove it")
    write_atomically(path, lambda new: new.write_text("".join(json.dumps(line) + "\n" for line in (asked, *results))))
    return results, open(path, "a")


def main(argv):
    settings = load_settings(RewriteSettings, argv)
    if settings.style not in PROMPTS or min(settings.batch, settings.tries) < 1 or settings.temperature <= 0:
        raise InputError(f"style must be one of {', '.join(PROMPTS)}, batch and tries at least 1, temperature above 0")
    data, out = Path(settings.data), Path(settings.out)
    shards = sorted(data.glob("*.parquet"))
    if not shards or out.resolve() == data.resolve():
        raise InputError(f"data={data}, out={out}: give the folder that holds a data set's SPLIT-*.parquet, and another one")
    columns = ["speakers", "narrative", "new_narrative_s1", "new_narrative_s2"]
    try:
        wanted = {path: [job for row in pq.read_table(path, columns=columns).to_pylist()
                         for job in ((*row["speakers"], row["narrative"]), (*row["speakers"][::-1], row["narrative"]))]
                  for path in shards}  # two a row: from the side of the first speaker, of the second
    except (pa.ArrowException, OSError) as e:
        raise InputError(f"{data}: cannot read the columns {', '.join(columns)}: {' '.join(str(e).split())[:200]}") from e
    out.mkdir(parents=True, exist_ok=True)
    asked = {key: value for key, value in asdict(settings).items() if key not in ("out", "batch")}
    results, journal = open_journal(out / "rewritten.jsonl", asked)
    done = {(r["name"], r["other"], r["narrative"]): r for r in results}
    jobs = dict.fromkeys(job for part in wanted.values() for job in part)  # each once
    todo = sorted((job for job in jobs if job not in done), key=lambda job: len(job[2]))  # of like length: little padding
    print(f"{len(todo)} narratives to write; {len(jobs) - len(todo)} of {len(jobs)} are there already")
    if todo:
        model, tokenizer = load_chat_model(settings.model)
        torch.manual_seed(settings.seed)
        with tqdm(total=len(todo), unit="narrative") as bar, journal:
            for results in rewrite(todo, settings, lambda *what: write(model, tokenizer, *what)):
                journal.writelines(json.dumps(result) + "\n" for result in results)
                journal.flush()
                done |= {(r["name"], r["other"], r["narrative"]): r for r in results}
                bar.update(len(results))

    for path, part in wanted.items():
        table = pq.read_table(path)
        for side in (0, 1):
            name = f"new_narrative_s{side + 1}"
            old = table[name].to_pylist()
            new = [done[job]["text"] or kept for job, kept in zip(part[side::2], old)]
            table = table.set_column(table.column_names.index(name), name, pa.array(new, pa.string()))
        write_atomically(out / path.name, lambda new, table=table: pq.write_table(table, new, compression="zstd"))
    for name in ("info.json", "voices.json", "dropped.jsonl"):  # of prepare.py; they stay true
        if (data / name).exists():
            shutil.copy(data / name, out)
    kept = [done[job] for job in jobs if not done[job]["text"]]
    first = sum(done[job]["tries"] == 1 and done[job]["text"] != "" for job in jobs)
    print(f"{out}: {len(jobs) - len(kept)} of {len(jobs)} narratives rewritten by {settings.model}, {first} of them at the "
          f"first try; {len(kept)} kept as they were, listed with what was wrong in {out}/rewritten.jsonl")
    for result in kept[:20]:
        print(f"  kept {result['name']}'s of {result['narrative'][:60]!r}: {result['flaw'][:120]}")
