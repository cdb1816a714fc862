"""The properties of docs/barter.md, from a base's own dev decodings and from those with the reference in the prompt.

    python rollout.py collect barter --model barter --split dev -n 1000 --out out/barter-own
    python rollout.py collect barter --model barter --split dev -n 1000 --privileged --out out/barter-shown
    python weights/barter/card.py out/barter-own out/barter-shown

(f) is over the games to which both gave the same response: pairs of its tokens, and those of one block of 16.
"""
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402

GAME, TOK = data.game("barter"), data.load_tokenizer("barter")
SAID = [": (\\w+) (\\w+) .", "takes (\\w+) gives (\\w+) .", "swaps my (\\w+) for (\\w+) ."]


def text_of(record):
    ids = record["x0"]
    return TOK.decode(ids[:ids.index(TOK.eos_id)] if TOK.eos_id in ids else ids)


def right(records, keep=lambda visits: True):
    """Percent of the games whose visits are as asked for, and how many these are."""
    graded = [r["correct"] for r in records.values() if keep(re.findall(r"\d (\w+)", r["question"]))]
    return f"{100 * np.mean(graded):.1f}% of {len(graded)}"


def same_order(one, other, block_len):
    """-> shares of the pairs of content tokens that are revealed in the same order: of all, of one block."""
    n = len(TOK.encode(text_of(one)))
    a, b = (np.array(r["rank"][:n]) for r in (one, other))
    i, j = np.triu_indices(n, 1)
    agree = (a[i] < a[j]) == (b[i] < b[j])
    near = i // block_len == j // block_len
    return agree.mean(), agree[near].mean()


def main():
    own, shown = ({r["id"]: r for r in data.read_trajectories(path)} for path in sys.argv[1:])
    problems = {p["id"]: p for p in data.load_problems("barter", "dev", len(own))}
    for r in [*own.values(), *shown.values()]:
        r["question"] = problems[r["id"]]["prompt"]
    for name, records in (("own", own), ("shown", shown)):
        print(f"{name}: right {right(records)}")
        for rare in range(3):
            print(f"  {rare} unknown traders: {right(records, lambda who: sum(w in GAME.RARE for w in who) == rare)}")
        for n in range(GAME.LEAST, GAME.MOST + 1):
            print(f"  {n} visits: {right(records, lambda who: len(who) == n)}")
        texts = list(map(text_of, records.values()))
        counts = np.array([sum(len(re.findall(said, text)) for text in texts) for said in SAID])
        print("  phrases: " + ", ".join(f"{share:.1f}%" for share in 100 * counts / counts.sum()))
        copies = sum(text.strip() == problems[i]["solution"] for i, text in zip(records, texts))
        print(f"  responses that are the reference: {copies}")
    alike = [i for i in own if i in shown and text_of(own[i]) == text_of(shown[i])]
    shares = np.mean([same_order(own[i], shown[i], data.TINY_BLOCK) for i in alike], 0)
    print("same response in {} games; pairs in the same order: {:.1f}%, in one block {:.1f}%".format(len(alike), *100 * shares))


if __name__ == "__main__":
    main()
